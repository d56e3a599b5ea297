"""Language models: text, token by token."""
