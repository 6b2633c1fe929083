"""What computes the answers to requests: it knows neither commands nor servers."""
