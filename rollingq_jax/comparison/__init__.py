"""Arms against each other over seeds: what they are, how they are tuned, what the numbers say."""
