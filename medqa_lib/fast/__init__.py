"""The fast paths for training and answering. Delete this folder and the project works as before, only slower."""
