"""Training steps, what they take, and the loop around them with its checkpoints. No loss lives here."""
