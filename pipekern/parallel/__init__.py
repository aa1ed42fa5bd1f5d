"""More than one replica of a stage: where each process stands, and what goes between them."""
