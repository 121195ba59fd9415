"""Which rank holds which tokens, which rank computes what and when, and what travels: layouts, masks, plans, and what runs them."""
