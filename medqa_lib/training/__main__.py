"""`python -m medqa_lib.training exp_004`, or `accelerate launch -m medqa_lib.training exp_004`."""

from medqa_lib.reasons import user_errors
from medqa_lib.training.run import main

with user_errors():
    main()
