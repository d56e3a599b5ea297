"""Several processes: FSDP2 with frozen layers."""
