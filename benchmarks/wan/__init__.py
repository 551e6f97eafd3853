"""An emulated WAN on one machine; see README.md."""
