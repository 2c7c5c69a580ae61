"""What a chunk is trained on: which examples, how much general data, what the base says of them."""
