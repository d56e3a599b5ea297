"""Fine-tuning programs, a folder for each task; run them from the root of the repository with `python -m`."""
