"""What can be asked of a transformed model: report, verification, pictures."""
