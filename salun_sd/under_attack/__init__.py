"""A model under attack: an audit, each attack, and what its images show."""
