"""Where the arithmetic happens: devices, threads, processes, precision. No loss and no network lives here."""
