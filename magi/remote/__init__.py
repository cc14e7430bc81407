"""Client for MAGI-1 24B at the paid service WaveSpeedAI: submits a request once, leaks no key and loses no video."""
