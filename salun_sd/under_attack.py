"""The work of `attack`: an audit of the model, then each attack, and what its images show."""
