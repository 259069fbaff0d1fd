"""What lets other libraries use the models; nothing here imports them."""
