"""What people look at: inspection figures and pictures."""
