"""What others get: the adapter with its card on the Hub, the exported model, the demo and its Space."""
