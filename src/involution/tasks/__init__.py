"""Training: tasks as LightningModules, the commands that run them, and the report they end with."""
