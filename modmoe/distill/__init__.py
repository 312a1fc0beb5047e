"""A dense teacher becomes a modular student, module by module (m2mKD, arXiv:2402.16918)."""
