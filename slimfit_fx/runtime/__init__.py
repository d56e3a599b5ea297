"""What happens when a transformed model is called and differentiated."""
