"""`dormouse bench load`: how fast weights come from files into memory or onto a GPU, by peers' loaders and by ours."""
