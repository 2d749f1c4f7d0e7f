package main

import (
	"maps"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"
)

// A memory keeps values by key, each until it is due, and at most max of them.
// When it is full of what is not due, a tenth is forgotten, whichever.
type memory[V any] struct {
	max     int
	prune   int // the size at which to look for what is due
	entries map[string]dueValue[V]
}

type dueValue[V any] struct {
	value V
	due   time.Time
}

func newMemory[V any](max int) memory[V] {
	return memory[V]{max: max, entries: make(map[string]dueValue[V])}
}

// get returns a value that is not due yet.
func (m *memory[V]) get(key string) (v V, ok bool) {
	if e := m.entries[key]; time.Now().Before(e.due) {
		return e.value, true
	}
	return v, false
}

// put looks through the whole memory only when it has doubled since the last
// time, or is full.
func (m *memory[V]) put(key string, v V, life time.Duration) {
	now := time.Now()
	if _, known := m.entries[key]; !known && len(m.entries) >= min(m.prune, m.max) {
		maps.DeleteFunc(m.entries, func(_ string, e dueValue[V]) bool { return !now.Before(e.due) })
		if len(m.entries) >= m.max {
			maps.DeleteFunc(m.entries, func(string, dueValue[V]) bool { return len(m.entries) >= m.max-m.max/10 })
		}
		m.prune = max(1000, 2*len(m.entries))
	}
	m.entries[key] = dueValue[V]{v, now.Add(life)}
}

// A limiter lets each key pass rate times in any minute.
type limiter struct {
	rate int // 0 lets everything pass

	mu     sync.Mutex // guards passed
	passed memory[[]time.Time]
}

// maxKeys bounds a limiter's memory: some 30 MB if each has passed 60 times in
// the last minute.
const maxKeys = 20_000

func newLimiter(rate int) *limiter {
	return &limiter{rate: rate, passed: newMemory[[]time.Time](maxKeys)}
}

// pass returns 0 if the key may pass now, else how long it must wait.
func (l *limiter) pass(key string) time.Duration { return l.passAll(share{key, 1}) }

// A share is a key, and how many times the limiter's rate is its own.
type share struct {
	key   string
	times int
}

// passAll is pass for who counts under several keys: all of them must let it.
func (l *limiter) passAll(shares ...share) (wait time.Duration) {
	if l.rate == 0 {
		return 0
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, s := range shares {
		wait = max(wait, l.wait(s))
	}
	if wait > 0 {
		return wait
	}
	now := time.Now()
	for _, s := range shares {
		times, _ := l.passed.get(s.key)
		for len(times) > 0 && now.Sub(times[0]) >= time.Minute {
			times = times[1:]
		}
		l.passed.put(s.key, append(times, now), time.Minute)
	}
	return 0
}

// wait returns how long a share must wait to pass. l.mu is held.
func (l *limiter) wait(s share) time.Duration {
	times, _ := l.passed.get(s.key)
	most := s.times * l.rate
	if len(times) < most {
		return 0
	}
	return max(0, time.Until(times[len(times)-most].Add(time.Minute)))
}

// full tells whether a client may not pass now.
func (l *limiter) full(who netip.Addr) bool {
	if l.rate == 0 {
		return false
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.ContainsFunc(shares(who), func(s share) bool { return l.wait(s) > 0 })
}

// passClient is pass for a client.
func (l *limiter) passClient(who netip.Addr) time.Duration { return l.passAll(shares(who)...) }

// shares returns what a client counts by, the narrowest first. For an IPv6
// address that is its /64, which is one customer's, and at ten times the rate
// its /48, which a customer or a provider has whole. Loopback has ten times the
// rate too: it is all who come through a proxy that does not say who they are.
func shares(who netip.Addr) []share {
	switch {
	case who.IsLoopback():
		return []share{{"loopback", 10}}
	case who.Is6():
		near, _ := who.Prefix(64)
		wide, _ := who.Prefix(48)
		return []share{{near.String(), 1}, {wide.String(), 10}}
	}
	return []share{{who.String(), 1}}
}

// client returns who asks. Behind loopback (nginx, an ngrok agent), a Unix
// socket and the trusted proxies it is the last hop of X-Forwarded-For that is
// none of these: loopback if there is no such hop, the zero Addr if a proxy
// calls it by anything but an address.
func client(r *http.Request, trusted []netip.Prefix) netip.Addr {
	addr := netip.IPv6Loopback() // the peer of a Unix socket has no address
	if peer, err := netip.ParseAddrPort(r.RemoteAddr); err == nil {
		addr = peer.Addr().Unmap().WithZone("")
	}
	for _, hop := range slices.Backward(strings.Split(strings.Join(r.Header.Values("X-Forwarded-For"), ","), ",")) {
		if hop = strings.TrimSpace(hop); hop == "" {
			continue // lists may have empty elements: RFC 9110, 5.6.1.2
		}
		isProxy := addr.IsLoopback() || slices.ContainsFunc(trusted, func(p netip.Prefix) bool { return p.Contains(addr) })
		if !isProxy {
			break
		}
		withPort, err := netip.ParseAddrPort(hop)
		if addr = withPort.Addr(); err != nil {
			addr, err = netip.ParseAddr(hop)
		}
		if err != nil {
			return netip.Addr{}
		}
		addr = addr.Unmap().WithZone("")
	}
	return addr
}

// A parked poll takes some 17 kB, so all of them 350 MB. The caps are beyond what
// honest people need: a ticket has one page, and over the caps a page polls each
// second instead.
const (
	maxParked          = 20_000
	maxParkedPerTicket = 8   // polls whose browser is gone may linger
	maxParkedPerClient = 200 // an office behind one address
	maxParkedText      = 512 // bytes, of its URL and of each header that is kept; a page's have a fifth
)

// A parking counts the polls that are parked.
type parking struct {
	mu      sync.Mutex // guards the fields below
	total   int
	tickets map[key]int
	clients map[string]int
}

// enter takes a place for a poll, which leave gives back. It is false if a cap is
// reached; perClient is the client's.
func (p *parking) enter(ticket key, client string, perClient int) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.total == maxParked || p.tickets[ticket] == maxParkedPerTicket || p.clients[client] == perClient {
		return false
	}
	if p.tickets == nil {
		p.tickets, p.clients = make(map[key]int), make(map[string]int)
	}
	p.total++
	p.tickets[ticket]++
	p.clients[client]++
	return true
}

func (p *parking) leave(ticket key, client string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.total--
	if p.tickets[ticket]--; p.tickets[ticket] == 0 {
		delete(p.tickets, ticket)
	}
	if p.clients[client]--; p.clients[client] == 0 {
		delete(p.clients, client)
	}
}
