package main

import (
	"math"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"
)

// A limiter lets each key pass rate times in a window of time. The windows of all
// keys end together, so over the border of two a key can pass twice as often.
type limiter struct {
	rate   int // 0 lets everything pass
	window time.Duration

	mu     sync.Mutex     // guards the fields below
	passed map[string]int // how often each key has, in this window
	ends   time.Time      // of this window
}

// maxKeys bounds a limiter's memory, to some 2 MB: so many keys end a window early.
const maxKeys = 20_000

// A share is a key, and how many times the limiter's rate is its own.
type share struct {
	key   string
	times int
}

// one is the share of a key that counts alone.
func one(key string) share { return share{key, 1} }

// pass returns 0 if all shares may pass now, and counts that; else how long they
// must wait.
func (l *limiter) pass(shares ...share) time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.remaining(shares) <= 0 {
		return max(1, time.Until(l.ends))
	}
	for _, s := range shares {
		l.passed[s.key]++
	}
	return 0
}

// allows is pass for one key, where it matters only whether it may.
func (l *limiter) allows(key string) bool { return l.pass(one(key)) == 0 }

// left returns how many times the shares may still pass in this window.
func (l *limiter) left(shares ...share) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.remaining(shares)
}

// remaining is left for whoever holds l.mu.
func (l *limiter) remaining(shares []share) int {
	if now := time.Now(); !now.Before(l.ends) || len(l.passed) >= maxKeys {
		l.passed, l.ends = make(map[string]int), now.Add(l.window)
	}
	left := math.MaxInt
	for _, s := range shares {
		if l.rate > 0 {
			left = min(left, s.times*l.rate-l.passed[s.key])
		}
	}
	return left
}

// shares returns what a client counts by, the narrowest first. For an IPv6
// address that is its /64, which is one customer's, and at ten times the rate
// its /48, which a customer or a provider has whole. Loopback has ten times the
// rate too: it stands for all who come through a proxy that does not name them.
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

// client returns who asks. Behind loopback (nginx, an ngrok agent) and the trusted
// proxies it is the last hop of X-Forwarded-For that is none of these: the proxy
// itself if there is no such hop, the zero Addr if a proxy calls it by anything but
// an address.
func client(r *http.Request, trusted []netip.Prefix) netip.Addr {
	addr := addressOf(r.RemoteAddr)
	for _, hop := range slices.Backward(strings.Split(strings.Join(r.Header.Values("X-Forwarded-For"), ","), ",")) {
		isTrusted := slices.ContainsFunc(trusted, func(p netip.Prefix) bool { return p.Contains(addr) })
		if !isTrusted && !addr.IsLoopback() {
			break
		}
		if hop = strings.TrimSpace(hop); hop != "" { // lists may have empty elements: RFC 9110, 5.6.1.2
			addr = addressOf(hop)
		}
	}
	return addr
}

// addressOf reads an address, with a port or without one. Anything else yields the zero Addr.
func addressOf(text string) netip.Addr {
	addr, _ := netip.ParseAddr(text)
	if withPort, err := netip.ParseAddrPort(text); err == nil {
		addr = withPort.Addr()
	}
	return addr.Unmap().WithZone("")
}

const (
	maxWrong    = 10  // wrong signatures a minute from one client
	maxAllWrong = 600 // and from all
)

// A guessGuard makes guessing a secret slow: the Token, or somebody's digits. Over the
// limit, a right guess is answered as a wrong one is: else a guesser would see which
// works. Right ones never count.
type guessGuard struct {
	wrong limiter // by guesser
	once  limiter // by guesser too, to know who has been wrong at all
	all   limiter
}

// newGuessGuard lets each be wrong so many times in a window, and all together so many.
func newGuessGuard(each, all int, window time.Duration) *guessGuard {
	return &guessGuard{limiter{rate: each, window: window}, limiter{rate: 1, window: window},
		limiter{rate: all, window: window}}
}

// isOver tells whether a guesser is over the limit: its own or, if it has been wrong
// at all, everybody's.
func (g *guessGuard) isOver(who ...share) bool {
	return g.wrong.left(who...) <= 0 || g.once.left(who...) <= 0 && g.all.left(one("")) <= 0
}

// count notes that a guess was wrong.
func (g *guessGuard) count(who ...share) {
	g.wrong.pass(who...)
	g.once.pass(who...)
	g.all.pass(one(""))
}

// shutsOut tells whether a client's signature is not even to be looked at. Many can be
// behind a proxy that does not name them, WeChat among them: there only the length of
// the Token stops a guesser.
func (g *guessGuard) shutsOut(who netip.Addr) bool {
	return !who.IsLoopback() && !who.IsPrivate() && g.isOver(shares(who)...)
}

// judge returns nil if a client's signature is right and to be believed, else
// errSignature or errGuessing.
func (g *guessGuard) judge(who netip.Addr, isRight bool) error {
	switch {
	case isRight && !g.shutsOut(who):
		return nil
	case g.isOver(shares(who)...):
		return errGuessing
	}
	g.count(shares(who)...)
	return errSignature
}

// A parked poll takes some 18 kB, so all of them 360 MB. The caps are beyond what
// honest people need: a ticket has one page, and over the caps a page polls each
// second instead.
const (
	maxParked          = 20_000
	maxParkedPerTicket = 8   // polls whose browser is gone may linger
	maxParkedPerClient = 200 // an office behind one address
	maxParkedURI       = 512 // bytes; a page's has a fifth
)

// A parking counts the polls that are parked.
type parking struct {
	mu      sync.Mutex // guards the fields below
	total   int
	tickets map[key]int
	clients map[string]int
}

// park finds a place for a poll of a ticket, which leave gives back. The poll
// loses its headers: parsed, 10 kB of tiny ones take half a megabyte. ok is false
// over a cap, and for a request with a body: until that is read, nobody notices
// that the browser has gone.
func (p *parking) park(r *http.Request, ticket key, who netip.Addr) (leave func(), ok bool) {
	s := shares(who)[0]
	if r.ContentLength != 0 || len(r.RequestURI) > maxParkedURI || !p.enter(ticket, s.key, s.times*maxParkedPerClient) {
		return nil, false
	}
	r.Header, r.Host = nil, ""
	return func() { p.leave(ticket, s.key) }, true
}

// enter takes a place; perClient is how many the client may have.
func (p *parking) enter(ticket key, client string, perClient int) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.total == maxParked || p.tickets[ticket] == maxParkedPerTicket || p.clients[client] == perClient {
		return false
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

func (p *parking) count() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.total
}
