package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/url"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
)

const (
	redisTimeout    = time.Second      // of one try of a command, dialing included; there are two at most
	redisConns      = 16               // commands under way at once
	redisCheckEvery = 2 * time.Second  // also publishes something, for the subscription to hear
	redisSlack      = 10 * time.Second // how far the clocks of replicas may differ
	maxRedisValue   = 1 << 20          // bytes that Redis can make us read; a record has some KiB
	redisChannel    = "changed"        // after the prefix
	redisURLFormat  = `rediss?://([^:@/?#]*:[^/?#]+@)?([0-9A-Za-z._-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?(/[0-9]{0,9})?`

	// swapScript puts ARGV[2] in the place of ARGV[1]. It is true again for
	// whoever has done so and asks again, because the answer was lost.
	swapScript = `local held = redis.call('GET', KEYS[1])
if held == ARGV[2] then return 1 end
if held ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
redis.call('PUBLISH', ARGV[4], ARGV[5])
return 1`
)

var (
	errStoreUnavailable = errors.New("the store is unavailable")
	errNotRedis         = errors.New("what answers is not Redis")
)

// A refusal is an answer of Redis' that only a person can mend, in plain words.
type refusal string

func (r refusal) Error() string { return string(r) }

// parseRedisURL reads a REDIS_URL, and adds the port. Its error does not quote
// it, for the password.
func parseRedisURL(text string) (*url.URL, error) {
	_, malformed := like(redisURLFormat)(text)
	u, err := url.Parse(text)
	if err != nil || malformed != nil {
		return nil, errors.New("not redis[s]://[user:password@]host[:port][/db]")
	}
	if u.Port() == "" {
		u.Host = net.JoinHostPort(u.Hostname(), "6379")
	}
	return u, nil
}

// readCA reads a file of certificates.
func readCA(file string) (*x509.CertPool, error) {
	pool := x509.NewCertPool()
	text, err := os.ReadFile(file)
	if err == nil && !pool.AppendCertsFromPEM(text) {
		err = errors.New("no certificate in PEM")
	}
	return pool, err
}

// A redis keeps records in a Redis or Valkey that replicas share: each is JSON,
// by its key in hex. When Redis does not do what it should, the error is
// errStoreUnavailable, and a refusal besides if only a person can mend it.
type redis struct {
	url    *url.URL
	prefix string // of all keys, and of the channel
	log    *slog.Logger
	dial   func(ctx context.Context, network, address string) (net.Conn, error)
	idle   chan *redisConn
	down   atomic.Bool // set by a command that fails, until check succeeds
}

// newRedis returns a client, which dials when it is used. roots are for
// rediss://; nil means the system's.
func newRedis(u *url.URL, roots *x509.CertPool, prefix string, log *slog.Logger) *redis {
	r := &redis{url: u, prefix: prefix, log: log, dial: new(net.Dialer).DialContext}
	if u.Scheme == "rediss" {
		r.dial = (&tls.Dialer{Config: &tls.Config{RootCAs: roots}}).DialContext
	}
	r.idle = make(chan *redisConn, redisConns)
	for range redisConns {
		r.idle <- new(redisConn)
	}
	return r
}

func (r *redis) ready() error {
	if r.down.Load() {
		return errStoreUnavailable
	}
	return nil
}

func (r *redis) add(ctx context.Context, k key, next *record) (bool, error) {
	value := encode(next)
	earlier, err := r.first(ctx, k.String(), value, next.left()+redisSlack)
	return err == nil && (earlier == nil || bytes.Equal(earlier, value)), err
}

func (r *redis) get(ctx context.Context, k key) (*record, error) {
	value, err := r.do(ctx, "GET", r.prefix+k.String())
	if err != nil || value == nil {
		return nil, err
	}
	got := &record{held: string(value)}
	if err := json.Unmarshal(value, got); err != nil {
		return nil, fmt.Errorf("reading a record: %w", err)
	}
	return got, nil
}

func (r *redis) swap(ctx context.Context, k key, old, next *record) (bool, error) {
	return r.replace(ctx, k.String(), old.held, string(encode(next)), next.left()+redisSlack)
}

// encode returns a record as it is to be kept. Its nonce makes it unlike any
// other, so that whoever lost the answer to a command knows their own by it.
func encode(r *record) []byte {
	value, _ := json.Marshal(struct { // nothing in it can fail
		record
		Nonce string
	}{*r, rand.Text()})
	return value
}

// first keeps the first value that comes under a name, for life. It returns the
// earlier one, nil if there was none; whoever lost the answer meets their own.
func (r *redis) first(ctx context.Context, name string, value []byte, life time.Duration) (earlier []byte, err error) {
	return r.do(ctx, "SET", r.prefix+name, string(value), "NX", "GET", "PX", milliseconds(life))
}

// replace puts next in the place of old, for life, and tells all who watch.
func (r *redis) replace(ctx context.Context, name, old, next string, life time.Duration) (bool, error) {
	won, err := r.do(ctx, "EVAL", swapScript, "1", r.prefix+name,
		old, next, milliseconds(life), r.prefix+redisChannel, name)
	return string(won) == "1", err
}

// milliseconds is a life as PX takes it, which knows no 0.
func milliseconds(d time.Duration) string { return strconv.FormatInt(max(1, d.Milliseconds()), 10) }

// check tries what Redis must do, all of it: a read-only replica does some.
func (r *redis) check(ctx context.Context) error {
	name := "check:" + rand.Text()
	_, err := r.first(ctx, name, []byte("old"), redisTimeout)
	if err == nil {
		_, err = r.replace(ctx, name, "old", "new", redisTimeout)
	}
	if err == nil && r.down.CompareAndSwap(true, false) {
		r.log.Info("Redis is back")
	}
	return err
}

// watchHealth notices that Redis is away, or back, until ctx ends.
func (r *redis) watchHealth(ctx context.Context) {
	for ; ctx.Err() == nil; pause(ctx, redisCheckEvery) {
		r.check(ctx)
	}
}

// do returns the answer to a command. A connection that was idle can be dead, or
// lead to what is no longer the master: then it tries once more, on a new one.
// The end of ctx cuts no command off: at shutdown, a push under way still logs in,
// and a poll reads once more.
func (r *redis) do(ctx context.Context, args ...string) (value []byte, err error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*redisTimeout)
	defer cancel()
	select {
	case c := <-r.idle:
		wasIdle := c.Conn != nil
		value, err = r.try(ctx, c, args)
		if _, refused := errors.AsType[refusal](err); err != nil && !refused && wasIdle {
			value, err = r.try(ctx, c, args)
		}
		r.idle <- c
	case <-ctx.Done():
		err = errors.New("all connections are busy")
	}
	if err != nil {
		err = fmt.Errorf("%w: %s: %w", errStoreUnavailable, args[0], err)
		if r.down.CompareAndSwap(false, true) {
			r.log.Error("Redis is away", "err", err)
		}
	}
	return value, err
}

// try sends a command on a connection, which is closed after any error.
func (r *redis) try(ctx context.Context, c *redisConn, args []string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, redisTimeout)
	defer cancel()
	var err error
	if c.Conn == nil {
		err = r.connect(ctx, c)
	}
	var values [][]byte
	if err == nil {
		values, err = c.ask(ctx, args...)
	}
	if err == nil && len(values) != 1 {
		err = errNotRedis
	}
	if err != nil {
		c.close()
		return nil, err
	}
	return values[0], nil
}

// connect dials, and says who we are.
func (r *redis) connect(ctx context.Context, c *redisConn) (err error) {
	if c.Conn, err = r.dial(ctx, "tcp", r.url.Host); err != nil {
		return err
	}
	c.in = bufio.NewReader(c.Conn)
	if password, ok := r.url.User.Password(); ok {
		_, err = c.ask(ctx, "AUTH", cmp.Or(r.url.User.Username(), "default"), password)
	}
	if db := strings.TrimPrefix(r.url.Path, "/"); err == nil && db != "" {
		_, err = c.ask(ctx, "SELECT", db)
	}
	return err
}

// watch calls changed with each name that somebody swaps, until ctx ends. That
// is a hint, never the truth: messages get lost. After resubscribed, whoever
// waits must look again. Neither may block.
func (r *redis) watch(ctx context.Context, changed func(name string), resubscribed func()) {
	for told := false; ctx.Err() == nil; pause(ctx, redisTimeout) {
		err := r.subscribe(ctx, changed, resubscribed)
		if _, refused := errors.AsType[refusal](err); refused && !told {
			told = true
			r.log.Error("Redis tells of no changes", "err", err)
		}
	}
}

// subscribe is one subscription, until it breaks. It can break without either end
// noticing, so one that does not even hear our own checks is replaced.
func (r *redis) subscribe(ctx context.Context, changed func(name string), resubscribed func()) error {
	starting, cancel := context.WithTimeout(ctx, redisTimeout)
	defer cancel()
	var c redisConn
	defer c.close()
	if err := r.connect(starting, &c); err != nil {
		return err
	}
	defer context.AfterFunc(ctx, func() { c.Conn.Close() })()
	message, err := c.ask(starting, "SUBSCRIBE", r.prefix+redisChannel)
	for err == nil {
		switch string(message[0]) {
		case "subscribe":
			resubscribed()
		case "message":
			changed(string(message[len(message)-1]))
		}
		c.SetDeadline(time.Now().Add(redisCheckEvery + 2*redisTimeout))
		message, err = readReply(c.in)
	}
	return err
}

// A redisConn is a connection to Redis.
type redisConn struct {
	net.Conn // nil while there is none
	in       *bufio.Reader
}

func (c *redisConn) close() {
	if c.Conn != nil {
		c.Conn.Close()
	}
	c.Conn = nil
}

// ask sends a command, an array of strings, and returns what comes next.
func (c *redisConn) ask(ctx context.Context, args ...string) ([][]byte, error) {
	command := fmt.Appendf(nil, "*%d\r\n", len(args))
	for _, arg := range args {
		command = fmt.Appendf(command, "$%d\r\n%s\r\n", len(arg), arg)
	}
	deadline, _ := ctx.Deadline()
	c.SetDeadline(deadline)
	if _, err := c.Write(command); err != nil {
		return nil, err
	}
	return readReply(c.in)
}

// readReply reads what Redis answers: a value, which is nil if there is none, or
// the one to three values of an array. It reads little, whatever comes.
func readReply(in *bufio.Reader) ([][]byte, error) {
	var values [][]byte
	for due := 1; due > 0; due-- {
		line, err := in.ReadSlice('\n') // of 4 KiB at most: the reader's buffer
		if err != nil {
			return nil, err
		}
		text, whole := strings.CutSuffix(string(line), "\r\n")
		if !whole || text == "" || len(values) == 3 {
			return nil, errNotRedis
		}
		kind, text := text[0], text[1:]
		size, malformed := strconv.ParseUint(text, 10, 64)
		switch {
		case kind == '-':
			return nil, explain(text)
		case kind == '+', kind == ':':
			values = append(values, []byte(text))
		case kind == '$' && text == "-1":
			values = append(values, nil)
		case kind == '$' && malformed == nil && size <= maxRedisValue:
			value := make([]byte, size+2)
			if _, err := io.ReadFull(in, value); err != nil {
				return nil, err
			}
			if value, whole = bytes.CutSuffix(value, []byte("\r\n")); !whole {
				return nil, errNotRedis
			}
			values = append(values, value)
		case kind == '*' && malformed == nil && size >= 1 && size <= 3:
			due += int(size)
		default:
			return nil, errNotRedis
		}
	}
	return values, nil
}

// explain returns an error of Redis' as ours. What a person must mend is told in
// Redis' words, but not with our arguments, which it quotes at times.
func explain(reply string) error {
	code, _, _ := strings.Cut(reply, " ")
	words, _, _ := strings.Cut(reply, ", with args")
	switch {
	case code == "MOVED", code == "CLUSTERDOWN":
		return refusal("Redis Cluster is not supported")
	case words == "ERR syntax error":
		return refusal("Redis is too old: 7.0 is needed, or Valkey")
	case code == "ERR", code == "NOAUTH", code == "WRONGPASS", code == "NOPERM":
		return refusal("Redis answers " + words)
	}
	return errors.New("Redis answers " + code)
}
