"""What an update does to the entropy: exact polarity, forecasts, the audit, the asymmetry of tokens."""
