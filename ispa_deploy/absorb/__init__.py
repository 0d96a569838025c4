"""Instance-specific parametric absorption: statistics of what history adds, a closed form, the transition."""
