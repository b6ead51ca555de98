"""`python -m medqa_lib.demo`: see `publish.demo`."""

from medqa_lib.publish.demo import main
from medqa_lib.reasons import user_errors

if __name__ == "__main__":
    with user_errors():
        main()
