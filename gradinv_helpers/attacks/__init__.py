"""Attacks: from a shared update back to images and labels.

Nothing here can reach the truth. Restarts are chosen and stopped by what the attacker
sees: the distance between the dummy gradient and the shared one.
"""
