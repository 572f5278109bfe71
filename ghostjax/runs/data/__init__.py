"""What a run trains on: examples, validation sets, and the rows that are drawn from them."""
