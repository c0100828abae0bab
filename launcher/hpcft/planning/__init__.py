"""Planning: predicts the memory and time of layouts and chooses the cheapest that fits."""
