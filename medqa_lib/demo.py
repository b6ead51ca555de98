"""`python -m medqa_lib.demo`: see `publish.demo`."""

from medqa_lib.publish.demo import main

if __name__ == "__main__":
    main()
