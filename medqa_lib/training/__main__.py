"""`python -m medqa_lib.training exp_004`; several processes: `accelerate launch -m medqa_lib.training exp_004`."""

from medqa_lib.training.run import main

main()
