"""The Space's app.py: starts the demo with the adapters beside it."""

import os

os.environ.setdefault("MEDQA_MODEL", "BASE_MODEL")

if __name__ == "__main__":
    from medqa_lib.publish.demo import main

    main(["--adapter", "adapters"])
