"""Files, text, errors, the machine: what every folder uses, and nothing about entropy."""
