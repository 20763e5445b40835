"""What an attacker believes about images before seeing an update."""
