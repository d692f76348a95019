"""Commands of `learner`: arguments in, exit code out."""
