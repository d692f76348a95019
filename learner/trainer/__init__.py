"""Fits a session under `trl.GRPOTrainer`: the only room that names TRL's private parts."""
