"""MAGI-1 24B as a paid service of WaveSpeedAI: a client that submits once, and loses neither keys nor videos."""
