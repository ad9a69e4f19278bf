"""Compliance: may these weights and data be used, and is what we ship safe to ship."""
