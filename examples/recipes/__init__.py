"""The paper's fine-tuning runs as files, and one program for all of them: see docs/recipes.md."""
