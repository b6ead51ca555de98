"""The fast paths for training and answering. Delete this folder and the project works as before, only slower.

`training.plan` imports `paths`, `evaluation.generation` imports `decode`; nothing else knows the folder.
"""
