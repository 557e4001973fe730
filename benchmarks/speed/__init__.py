"""What decoupling costs: time, memory, traffic between ranks."""
