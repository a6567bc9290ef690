"""Ways around erasures are noticed, whatever goes around them."""
