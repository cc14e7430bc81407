"""Holds weights and K/V on the host, in a file or on the device, and uploads them before they are used."""
