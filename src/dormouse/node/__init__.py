"""One host: which models are awake, who waits for them, what memory they take, and how they sleep and wake."""
