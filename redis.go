package main

import (
	"bufio"
	"bytes"
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
	redisTimeout   = time.Second     // of one try of a command, dialing included; there are two at most
	redisConns     = 16              // commands under way at once
	redisPingEvery = 2 * time.Second // a connection can be lost without either end being told
	maxRedisValue  = 64 << 10        // bytes that Redis can make us read; a record has some KiB
	redisChannel   = "changed"       // after the prefix
	redisURLFormat = `rediss?://([^:@/?#]*:[^/?#]+@)?([0-9A-Za-z._-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?(/[0-9]{0,9})?`

	redisACL = "REDIS_URL names a user who may too little: ~PREFIX* &PREFIX* +set +get +eval +publish +subscribe +ping"

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

// A redis keeps values in a Redis or Valkey that replicas share. Each error is
// errStoreUnavailable; one that only a person can mend is a refusal besides.
type redis struct {
	url    *url.URL
	prefix string // of all keys, and of the channel
	log    *slog.Logger
	dial   func(ctx context.Context, network, address string) (net.Conn, error)
	idle   chan *redisConn
	down   atomic.Bool
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

// up tells whether Redis has taken what was last written.
func (r *redis) up() bool { return !r.down.Load() }

// first keeps the first value that comes under a name, for life. It returns the
// earlier one, nil if there was none; whoever lost the answer meets their own.
func (r *redis) first(ctx context.Context, name string, value []byte, life time.Duration) (earlier []byte, err error) {
	return r.do(ctx, "SET", r.prefix+name, string(value), "NX", "GET", "PX", milliseconds(life))
}

// add keeps a value for life. It is false if the name has another.
func (r *redis) add(ctx context.Context, name string, value []byte, life time.Duration) (bool, error) {
	earlier, err := r.first(ctx, name, value, life)
	return err == nil && (earlier == nil || bytes.Equal(earlier, value)), err
}

// get returns a value, nil if there is none.
func (r *redis) get(ctx context.Context, name string) ([]byte, error) {
	return r.do(ctx, "GET", r.prefix+name)
}

// swap puts next in the place of old, for life, and tells all who watch. It is
// true for one caller alone, provided that no two bring the same next.
func (r *redis) swap(ctx context.Context, name string, old, next []byte, life time.Duration) (bool, error) {
	won, err := r.do(ctx, "EVAL", swapScript, "1", r.prefix+name,
		string(old), string(next), milliseconds(life), r.prefix+redisChannel, name)
	return string(won) == "1", err
}

// milliseconds is a life as PX takes it, which knows no 0.
func milliseconds(d time.Duration) string { return strconv.FormatInt(max(1, d.Milliseconds()), 10) }

// check tries all that Redis must do. A program that starts should end on a refusal.
func (r *redis) check(ctx context.Context) error {
	name := "check:" + rand.Text()
	_, err := r.add(ctx, name, []byte("old"), redisTimeout)
	if err == nil {
		_, err = r.swap(ctx, name, []byte("old"), []byte("new"), redisTimeout)
	}
	return err
}

// do returns the answer to a command, within two tries. The end of ctx cuts no
// command off: at shutdown, a push under way still logs in, and a poll reads once more.
func (r *redis) do(ctx context.Context, args ...string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*redisTimeout)
	defer cancel()
	value, err := r.exchange(ctx, args)
	switch {
	case err != nil:
		err = fmt.Errorf("%w: %s: %w", errStoreUnavailable, args[0], err)
		if r.down.CompareAndSwap(false, true) {
			r.log.Error("Redis is away", "err", err)
		}
	case args[0] == "SET" && r.down.CompareAndSwap(true, false): // a read-only replica answers others
		r.log.Info("Redis is back")
	}
	return value, err
}

// exchange tries a command on an idle connection. If that was an old one and
// turns out to be dead, it tries again on a new one.
func (r *redis) exchange(ctx context.Context, args []string) (value []byte, err error) {
	var c *redisConn
	select {
	case c = <-r.idle:
	case <-ctx.Done():
		return nil, errors.New("all connections are busy")
	}
	defer func() { r.idle <- c }()
	for fresh := false; !fresh; {
		fresh = c.Conn == nil
		value, err = r.try(ctx, c, args)
		if _, refused := errors.AsType[refusal](err); err == nil || refused {
			break
		}
	}
	return value, err
}

func (r *redis) try(ctx context.Context, c *redisConn, args []string) (value []byte, err error) {
	ctx, cancel := context.WithTimeout(ctx, redisTimeout)
	defer cancel()
	if c.Conn == nil {
		err = r.connect(ctx, c)
	}
	if err == nil {
		value, err = c.do(ctx, args...)
	}
	if err != nil {
		c.close() // even after an error of Redis': a new connection may lead to the new master
	}
	return value, err
}

// connect dials, and says who we are.
func (r *redis) connect(ctx context.Context, c *redisConn) (err error) {
	if c.Conn, err = r.dial(ctx, "tcp", r.url.Host); err != nil {
		return err
	}
	c.in = bufio.NewReader(c.Conn)
	password, _ := r.url.User.Password()
	switch user := r.url.User.Username(); {
	case user != "":
		_, err = c.do(ctx, "AUTH", user, password)
	case password != "":
		_, err = c.do(ctx, "AUTH", password)
	}
	if db := strings.TrimPrefix(r.url.Path, "/"); err == nil && db != "" {
		_, err = c.do(ctx, "SELECT", db)
	}
	return err
}

// watch calls changed with each name that somebody swaps, until ctx ends. That
// is a hint, never the truth: messages get lost. After resubscribed, whoever
// waits must look again. Neither may block.
func (r *redis) watch(ctx context.Context, changed func(name string), resubscribed func()) {
	for told := false; ctx.Err() == nil; {
		err := r.subscribe(ctx, changed, resubscribed)
		if _, refused := errors.AsType[refusal](err); refused && !told {
			told = true
			r.log.Error("Redis tells of no changes", "err", err)
		}
		pause(ctx, redisTimeout)
	}
}

// watchHealth notices that Redis is away, or back, while nobody else asks, until ctx ends.
func (r *redis) watchHealth(ctx context.Context) {
	for ctx.Err() == nil {
		r.check(ctx)
		pause(ctx, redisPingEvery)
	}
}

// pause returns after d, or when ctx ends.
func pause(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}

// subscribe is one subscription, until it breaks.
func (r *redis) subscribe(ctx context.Context, changed func(name string), resubscribed func()) error {
	starting, cancel := context.WithTimeout(ctx, redisTimeout)
	defer cancel()
	var c redisConn
	defer c.close()
	if err := r.connect(starting, &c); err != nil {
		return err
	}
	defer context.AfterFunc(ctx, func() { c.Conn.Close() })()
	message, err := c.ask(time.Now().Add(redisTimeout), "SUBSCRIBE", r.prefix+redisChannel)
	for ; err == nil; message, err = c.next() {
		switch string(message[0]) {
		case "subscribe":
			resubscribed()
		case "message":
			changed(string(message[len(message)-1]))
		}
	}
	return err
}

// sharedRecords are records in Redis: each is JSON, by its key in hex.
type sharedRecords struct{ redis *redis }

func (s sharedRecords) ready() error {
	if !s.redis.up() {
		return errStoreUnavailable
	}
	return nil
}

func (s sharedRecords) add(ctx context.Context, k key, r *record) (bool, error) {
	return s.redis.add(ctx, k.String(), encode(r), r.left())
}

func (s sharedRecords) get(ctx context.Context, k key) (*record, error) {
	value, err := s.redis.get(ctx, k.String())
	if err != nil || value == nil {
		return nil, err
	}
	r := new(record)
	if json.Unmarshal(value, r) != nil {
		return nil, fmt.Errorf("%w: what is under a ticket's key is no record", errStoreUnavailable)
	}
	return r, nil
}

func (s sharedRecords) swap(ctx context.Context, k key, old, next *record) (bool, error) {
	held, err := json.Marshal(old) // as encode wrote it
	if err != nil {
		return false, err
	}
	return s.redis.swap(ctx, k.String(), held, encode(next), next.left())
}

// encode returns a new record as JSON, with a nonce: whoever lost the answer to a
// command knows their own by it.
func encode(r *record) []byte {
	r.Nonce = rand.Text()
	r.Since, r.Ends = r.Since.UTC(), r.Ends.UTC() // to be the same when read and written again
	value, _ := json.Marshal(r)                   // nothing in it can fail
	return value
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

// do sends a command and returns its answer, of one value.
func (c *redisConn) do(ctx context.Context, args ...string) ([]byte, error) {
	deadline, _ := ctx.Deadline()
	values, err := c.ask(deadline, args...)
	switch {
	case err != nil:
		return nil, err
	case len(values) != 1:
		return nil, errNotRedis
	}
	return values[0], nil
}

// ask sends a command, an array of strings, and returns what comes next.
func (c *redisConn) ask(deadline time.Time, args ...string) ([][]byte, error) {
	command := fmt.Appendf(nil, "*%d\r\n", len(args))
	for _, arg := range args {
		command = fmt.Appendf(command, "$%d\r\n%s\r\n", len(arg), arg)
	}
	c.SetDeadline(deadline)
	if _, err := c.Write(command); err != nil {
		return nil, err
	}
	return readReply(c.in)
}

// next returns the next message of a subscription. After a silence it asks for one.
func (c *redisConn) next() ([][]byte, error) {
	c.SetDeadline(time.Now().Add(redisPingEvery))
	_, err := c.in.Peek(1)
	deadline := time.Now().Add(redisTimeout)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return c.ask(deadline, "PING")
	}
	c.SetDeadline(deadline)
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

// explain puts an error of Redis' in our words. Of one that is not known it
// gives the first alone, as READONLY or LOADING: the others can quote secrets.
func explain(reply string) error {
	for _, known := range []struct{ begin, words string }{
		{"WRONGPASS", "Redis takes no such user and password as REDIS_URL has"},
		{"NOAUTH", "Redis asks for a password, and REDIS_URL has none"},
		{"ERR AUTH <password> called without any", "REDIS_URL has a password, and Redis asks for none"},
		{"NOPERM", redisACL},
		{"ERR The user executing the script", redisACL}, // 7.0
		{"ERR ACL failure in script", redisACL},
		{"ERR DB index", "Redis does not have the database that REDIS_URL names"},
		{"ERR SELECT is not allowed in cluster", "Redis Cluster is not supported"},
		{"MOVED", "Redis Cluster is not supported"},
		{"CLUSTERDOWN", "Redis Cluster is not supported"},
		{"ERR syntax error", "Redis is too old: 7.0 is needed, or Valkey"},
		{"ERR unknown command", "Redis lacks one of the commands AUTH SELECT SET GET EVAL PUBLISH SUBSCRIBE PING"},
	} {
		if strings.HasPrefix(reply, known.begin) {
			return refusal(known.words)
		}
	}
	code, _, _ := strings.Cut(reply, " ")
	return errors.New("Redis answers " + code)
}
