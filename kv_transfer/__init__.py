"""KV blocks from one node to another: who may read what until when, and how the bytes move. Knows no model and no tensors.

    layout.py      how one rank's KV cache lies in its buffer; whether two peers fit
    reshard.py     pure: (source layouts, target layout) -> which bytes come from which source rank
    lease.py       pure: a prefill's promise to keep blocks readable, as a state machine
    transport.py   the seam: Span(s), Check, Export, Ticket, Source, Destination
    pool.py        the buffer a node allocates and gives to its engine (memfd or private memory)
    thread.py      the one transfer thread of a rank: sockets, timers and copies, never blocked by one peer
    memory.py      reading mapped memory, checked before and after; loopback.py and shm.py are ways to get such a mapping
    copying.py     many spans with one call: native/ is the loop in C, built at install, beside which Python's stays
    resident.py    having pages there before they are needed
    tcp_frame.py tcp_socket.py tcp.py tcp_source.py    the same over raw TCP: frames, sockets, reading end, serving end
    listener.py    accepting connections on the transfer thread
    choose.py      which transport reaches an export: proven, never assumed
    source.py      serving end of one rank: opens the listeners, says where in an Export
    reader.py      reading end of one rank: plan + transports -> one ticket per read
    server.py      gRPC: the prefill leader's leases and announcements; exports as messages
    link.py        what it keeps of each Pull, and of the stream that carries those of one puller
    client.py      gRPC: the decode leader's Pulls; exports from messages
    line.py        gRPC: its streams, one per prefill leader

A prefill rank holds Pool + TransferThread + SourceRank, its leader also a TransferService. A decode rank holds Pool + TransferThread
+ Reader, its leader also a PullClient.
"""
