package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// A realRedis is a redis-server on loopback. Its data end with it, unless it is durable.
type realRedis struct {
	t    *testing.T
	port string
	args []string
	cmd  *exec.Cmd // nil while it is stopped
}

// durable has a redis-server keep its data when it is killed.
var durable = []string{"--appendonly", "yes", "--appendfsync", "always"}

// startRedis starts a redis-server, which ends with the test.
func startRedis(t *testing.T, args ...string) *realRedis {
	t.Helper()
	program(t, "redis-server", "redis-server")
	_, port, err := net.SplitHostPort(freeAddress(t))
	must(t, err)
	s := &realRedis{t: t, port: port, args: append([]string{"--port", port, "--bind", "127.0.0.1",
		"--dir", t.TempDir(), "--save", "", "--repl-diskless-sync-delay", "0"}, args...)}
	s.start()
	t.Cleanup(s.kill)
	return s
}

// start starts the server and waits until it answers.
func (s *realRedis) start() {
	s.t.Helper()
	s.cmd = exec.Command("redis-server", s.args...)
	must(s.t, s.cmd.Start())
	eventually(s.t, "redis-server answers", func() bool {
		conn, err := net.Dial("tcp", "127.0.0.1:"+s.port)
		if err != nil {
			return false
		}
		defer conn.Close()
		io.WriteString(conn, "PING\r\n")
		answer, _ := bufio.NewReader(conn).ReadString('\n')
		return answer != "" && !strings.HasPrefix(answer, "-LOADING")
	})
}

// kill ends the server with SIGKILL, also a frozen one.
func (s *realRedis) kill() {
	if s.cmd != nil {
		s.cmd.Process.Kill()
		s.cmd.Wait()
		s.cmd = nil
	}
}

// freeze stops the server, which keeps its connections and answers nothing.
func (s *realRedis) freeze() { must(s.t, s.cmd.Process.Signal(syscall.SIGSTOP)) }
func (s *realRedis) thaw()   { must(s.t, s.cmd.Process.Signal(syscall.SIGCONT)) }

func (s *realRedis) url() string { return "redis://127.0.0.1:" + s.port }

// do runs a command as the server's administrator would.
func (s *realRedis) do(args ...string) string {
	s.t.Helper()
	value, err := newTestRedis(s.t, s.url(), nil).do(s.t.Context(), args...)
	must(s.t, err)
	return string(value)
}

// follow makes the server a read-only replica of another.
func (s *realRedis) follow(master *realRedis) {
	s.t.Helper()
	s.do("REPLICAOF", "127.0.0.1", master.port)
	eventually(s.t, "the replica follows", func() bool {
		return strings.Contains(s.do("INFO", "replication"), "master_link_status:up")
	})
}

// newTestRedis returns a client, whose log goes to logged, too, unless that is nil.
func newTestRedis(t testing.TB, rawURL string, logged io.Writer) *redis {
	t.Helper()
	u, err := parseRedisURL(rawURL)
	must(t, err)
	out := io.Discard
	if logged != nil {
		out = io.MultiWriter(logged, t.Output())
	}
	r := newRedis(u, nil, "wxscan:", slog.New(slog.NewTextHandler(out, nil)))
	t.Cleanup(r.hangUp)
	return r
}

// hangUp closes the connections.
func (r *redis) hangUp() {
	for range redisConns {
		(<-r.idle).close()
	}
}

// read returns what is under a name.
func (r *redis) read(ctx context.Context, name string) ([]byte, error) {
	return r.do(ctx, "GET", r.prefix+name)
}

// eventually waits until something is so.
func eventually(t *testing.T, what string, so func() bool) {
	t.Helper()
	for range 1000 {
		if so() {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatal("never: " + what)
}

func TestRedisURLNamesServerUserAndDatabase(t *testing.T) {
	for text, want := range map[string][]string{
		"redis://example.org":         {"redis", "example.org:6379", "", "", ""},
		"redis://127.0.0.1:1234/5":    {"redis", "127.0.0.1:1234", "", "", "/5"},
		"rediss://[::1]/":             {"rediss", "[::1]:6379", "", "", "/"},
		"redis://:secret@redis_1:1":   {"redis", "redis_1:1", "", "secret", ""},
		"redis://me:s%2Fcr%23t@h:1/0": {"redis", "h:1", "me", "s/cr#t", "/0"},
		"redis://me:a:b@c@h":          {"redis", "h:6379", "me", "a:b@c", ""},
	} {
		u, err := parseRedisURL(text)
		must(t, err)
		password, _ := u.User.Password()
		if got := []string{u.Scheme, u.Host, u.User.Username(), password, u.Path}; !slices.Equal(got, want) {
			t.Errorf("%q: got %q, want %q", text, got, want)
		}
	}
	for _, text := range []string{
		"", "http://:secret@h", "redis:h", "redis://", "redis://:secret@", "redis://secret@h", "redis://h:secret",
		"redis://h/secret", "redis://h/-1", "redis://h?db=1", "redis://:secret%zz@h", "redis://:sec#ret@h",
		"redis://:secret@h:999999", "redis://:secret@h/1/2", "redis://:@h", " redis://h", "redis://h\n",
		"redis://:secret@a,b", "redis://[::1",
	} {
		if u, err := parseRedisURL(text); err == nil || strings.Contains(err.Error(), "sec") {
			t.Errorf("%q: %v, %v", text, u, err)
		}
	}
}

func TestRedisGivesOneNameToOneValueForItsLife(t *testing.T) {
	server := startRedis(t)
	r := newTestRedis(t, server.url(), nil)
	ctx, cancel := context.WithCancel(t.Context())
	cancel() // which cuts no command off
	odd, big := []byte("\r\n$-1\r\n\x00\xff"), bytes.Repeat([]byte("x"), maxRedisValue)
	for _, test := range []struct {
		name           string
		value, earlier []byte
	}{
		{"a", odd, nil}, {"a", odd, odd}, {"a", []byte("b"), odd}, // the second asks again, after a lost answer
		{"empty", nil, nil}, {"empty", odd, []byte{}}, {"big", big, nil}, {"big", odd, big},
	} {
		earlier, err := r.first(ctx, test.name, test.value, time.Hour)
		if (earlier == nil) != (test.earlier == nil) || !bytes.Equal(earlier, test.earlier) || err != nil {
			t.Errorf("%s, %.20q: %.20q, %v, want %.20q", test.name, test.value, earlier, err, test.earlier)
		}
	}
	for _, test := range []struct {
		name, old, next string
		won             bool
	}{
		{"a", "b", "3", false}, {"a", string(odd), "2", true},
		{"a", string(odd), "2", true}, {"a", string(odd), "3", false}, // again, as if the answer was lost
		{"none", "", "1", false}, {"none", "", "1", false},
	} {
		if won, err := r.replace(ctx, test.name, test.old, test.next, 90*time.Second); won != test.won || err != nil {
			t.Errorf("%+v: %v, %v", test, won, err)
		}
	}
	if left := server.do("PTTL", "wxscan:a"); len(left) != 5 || left > "90000" {
		t.Errorf("%s ms left, want 90000", left)
	}
	if _, err := r.first(ctx, "short", odd, 0); err != nil { // shorter than Redis knows
		t.Error(err)
	}
	eventually(t, "a value ends", func() bool { value, err := r.read(ctx, "short"); return value == nil && err == nil })
}

// TestARecordOfAnotherVersionCanBeSwapped is for an update of one replica after the other.
func TestARecordOfAnotherVersionCanBeSwapped(t *testing.T) {
	server := startRedis(t)
	r := newTestRedis(t, server.url(), nil)
	s, k := newStore(time.Minute, r), digest("t")
	record := fmt.Appendf(nil, `{"New":[1], "Status":"pending","Flow":"scan","Ends":%q}`,
		time.Now().Add(time.Minute).Format(time.RFC3339Nano))
	_, err := r.first(t.Context(), k.String(), record, time.Minute)
	must(t, err)
	inTime(t, 5*time.Second, "the scan", func() {
		if !s.scans(t, k, "alice") {
			t.Error("nobody is logged in")
		}
	})
	// A replica whose clock is behind still finds the result.
	if left, _ := strconv.Atoi(server.do("PTTL", "wxscan:"+k.String())); left <= int(resultTTL.Milliseconds()) {
		t.Errorf("Redis forgets the result after %d ms", left)
	}
}

func TestRefusalsOfRedisAreInPlainWords(t *testing.T) {
	users := startRedis(t, "--user", "default", "on", ">secret", "~*", "&*", "+@all",
		"--user", "me", "on", ">secret", "~wxscan:*", "&wxscan:*", "-@all",
		"+set", "+get", "+eval", "+publish", "+subscribe", "+select",
		"--user", "other", "on", ">secret", "~other:*", "&*", "+@all",
		"--user", "mute", "on", ">secret", "~*", "resetchannels", "+@all").port
	_, busPort, err := net.SplitHostPort(freeAddress(t)) // else it is port + 10000, which others may have
	must(t, err)
	cluster := startRedis(t, "--cluster-enabled", "yes", "--cluster-port", busPort).port
	for _, test := range []struct{ auth, port, db, want string }{
		{"", users, "", "NOAUTH Authentication required."},
		{":wrongsecret@", users, "", "WRONGPASS invalid username"},
		{":secret@", users, "/15", ""},
		{":secret@", users, "/16", "ERR DB index"},
		{"me:secret@", users, "/1", ""},
		{"nobody:secret@", users, "", "WRONGPASS invalid username"},
		{"other:secret@", users, "", "NOPERM"},
		{"mute:secret@", users, "", "ERR"},
		{"", cluster, "", "Cluster is not supported"},
		{"", cluster, "/1", "not allowed in cluster mode"},
	} {
		err := newTestRedis(t, "redis://"+test.auth+"127.0.0.1:"+test.port+test.db, nil).check(t.Context())
		_, refused := errors.AsType[refusal](err)
		if refused != (test.want != "") || (err != nil) != refused || !strings.Contains(fmt.Sprint(err), test.want) ||
			strings.Contains(fmt.Sprint(err), "secret") {
			t.Errorf("%+v: %v, a refusal: %v", test, err, refused)
		}
	}
	for reply, want := range map[string]refusal{
		"MOVED 3999 127.0.0.1:6381": "Redis Cluster is not supported",
		"ERR syntax error":          "Redis is too old: 7.0 is needed, or Valkey",
		"ERR unknown command, with args beginning with: 'secret'": "Redis answers ERR unknown command",
	} {
		equal(t, reply, explain(reply), error(want))
	}
}

func TestRedissTrustsTheCertificatesOfREDIS_CA(t *testing.T) {
	certFile, keyFile := certificate(t)
	address := freeAddress(t)
	_, port, _ := net.SplitHostPort(address)
	startRedis(t, "--tls-port", port, "--tls-cert-file", certFile, "--tls-key-file", keyFile,
		"--tls-ca-cert-file", certFile, "--tls-auth-clients", "no")
	r := newTestRedis(t, "rediss://"+address, nil)
	if err := r.check(t.Context()); err == nil || !strings.Contains(err.Error(), "certificate") {
		t.Errorf("an unknown certificate: %v", err)
	}
	roots, err := readCA(certFile)
	must(t, err)
	must(t, newRedis(r.url, roots, "wxscan:", slog.New(slog.DiscardHandler)).check(t.Context()))
	if _, err := readCA(keyFile); err == nil {
		t.Error("a key is taken for a certificate")
	}
}

func TestWatchHearsOfSwapsAndChecks(t *testing.T) {
	server := startRedis(t)
	r, other := newTestRedis(t, server.url(), nil), newTestRedis(t, server.url(), nil)
	ctx, cancel := context.WithCancel(t.Context())
	heard := make(chan string, 10)
	var watching sync.WaitGroup
	watching.Go(func() { r.watch(ctx, func(name string) { heard <- name }, func() { heard <- "subscribed" }) })
	equal(t, "first", <-heard, "subscribed")
	other.first(ctx, "a", []byte("1"), time.Minute)
	if ok, err := other.replace(ctx, "a", "1", "2", time.Minute); !ok || err != nil {
		t.Fatal(ok, err)
	}
	equal(t, "after a swap", <-heard, "a")
	must(t, r.check(ctx))
	equal(t, "after a check", (<-heard)[:6], "check:")
	cancel()
	watching.Wait()
}

// A fakeAnswer answers a command on the nth connection, from 1; false closes it.
type fakeAnswer func(n int, args []string, out io.Writer) (more bool)

// fakeRedis returns a client, for a bubble, whose connections are answered by a
// function, and its log.
func fakeRedis(t *testing.T, answer fakeAnswer) (*redis, *syncBuffer) {
	t.Helper()
	logged := new(syncBuffer)
	r := newTestRedis(t, "redis://fake", logged)
	var dialed atomic.Int32
	r.dial = func(context.Context, string, string) (net.Conn, error) {
		ours, theirs := net.Pipe()
		n, in := int(dialed.Add(1)), bufio.NewReader(theirs)
		go func() { // until either end closes
			defer theirs.Close()
			for args := readCommand(in); args != nil && answer(n, args, theirs); args = readCommand(in) {
			}
		}()
		return ours, nil
	}
	return r, logged
}

// readCommand reads a command, and says what its strings are.
func readCommand(in *bufio.Reader) (args []string) {
	var n, size int
	fmt.Fscanf(in, "*%d\r\n", &n)
	for range n {
		fmt.Fscanf(in, "$%d\r\n", &size)
		arg := make([]byte, size+2)
		io.ReadFull(in, arg)
		args = append(args, string(arg[:size]))
	}
	return args
}

// TestConnectionsThatTurnOutDeadCostNoCommand has those dialed first fail, and new
// ones work: a restart, or a failover. Then all fail.
func TestConnectionsThatTurnOutDeadCostNoCommand(t *testing.T) {
	for _, last := range []string{"", "no Redis", "silent", "*2\r\n+a\r\n+b\r\n", "$1\r\n", "-READONLY no\r\n",
		"-LOADING x\r\n", "-MASTERDOWN x\r\n"} {
		synctest.Test(t, func(t *testing.T) {
			var working atomic.Int32 // connections from this one on
			r, logged := fakeRedis(t, func(n int, _ []string, out io.Writer) bool {
				if n > int(working.Load()) {
					io.WriteString(out, ":1\r\n")
					return true
				}
				if last != "silent" {
					io.WriteString(out, last)
				}
				return last != "" && last != "$1\r\n" // cut off
			})
			for i := range 3 * redisConns {
				if i == redisConns {
					working.Store(redisConns)
				}
				if won, err := r.replace(t.Context(), "a", "", "", time.Minute); !won || err != nil {
					t.Fatalf("%q: %v, %v", last, won, err)
				}
			}
			equal(t, "logged", logged.String(), "")
			working.Store(1000)
			for i := range redisConns + 1 {
				patience := 2 * redisTimeout
				if i == redisConns {
					patience = redisTimeout // of one try, for all connections are new
				}
				start := time.Now()
				_, err := r.read(t.Context(), "a")
				_, refused := errors.AsType[refusal](err)
				took := time.Since(start)
				if !errors.Is(err, errStoreUnavailable) || refused || r.ready() == nil || took > patience {
					t.Fatalf("%q: %v after %v", last, err, took)
				}
			}
		})
	}
}

func TestARecordIsAddedByWhoeverMeetsTheirOwn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var isOwn atomic.Bool // the answer to the first try was lost
		r, _ := fakeRedis(t, func(_ int, args []string, out io.Writer) bool {
			held := "another"
			if isOwn.Load() {
				held = args[2]
			}
			fmt.Fprintf(out, "$%d\r\n%s\r\n", len(held), held)
			return true
		})
		for _, want := range []bool{false, true} {
			isOwn.Store(want)
			if added, err := r.add(t.Context(), digest("t"), &record{}); added != want || err != nil {
				t.Errorf("%v, %v, want %v", added, err, want)
			}
		}
	})
}

// TestRedisThatDoesOnlyHalfIsAwayAllTheTime is of one that writes, and runs no scripts.
func TestRedisThatDoesOnlyHalfIsAwayAllTheTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		r, logged := fakeRedis(t, func(_ int, args []string, out io.Writer) bool {
			io.WriteString(out, map[string]string{"SET": "$-1\r\n", "EVAL": "-NOPERM x\r\n"}[args[0]])
			return true
		})
		r.watchHealth(ctx)
		equal(t, "it is ready", r.ready() == nil, false)
		equal(t, "lines in the log", strings.Count(logged.String(), "\n"), 1)
	})
}

// oneLineEach complains unless a log says once that Redis is away, and then that it is back.
func oneLineEach(t *testing.T, logged string) {
	t.Helper()
	if strings.Count(logged, "Redis is away") != 1 || strings.Count(logged, "Redis is back") != 1 {
		t.Errorf("not one line each: %s", logged)
	}
}

// TestASubscriptionThatBreaksIsReplaced has the first not even hear of checks any more,
// the second and third refused, which is logged once, and the fourth closed.
func TestASubscriptionThatBreaksIsReplaced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		r, logged := fakeRedis(t, func(n int, _ []string, out io.Writer) bool {
			if n == 2 || n == 3 {
				io.WriteString(out, "-NOPERM x\r\n")
				return true
			}
			io.WriteString(out, "*3\r\n$9\r\nsubscribe\r\n$14\r\nwxscan:changed\r\n:1\r\n")
			for range 3 {
				time.Sleep(redisCheckEvery)
				io.WriteString(out, "*3\r\n$7\r\nmessage\r\n$14\r\nwxscan:changed\r\n$7\r\ncheck:X\r\n")
			}
			return n == 1
		})
		start, subscribed := time.Now(), make(chan time.Duration, 10)
		var watching sync.WaitGroup
		watching.Go(func() { r.watch(ctx, func(string) {}, func() { subscribed <- time.Since(start) }) })
		fourth := 4*redisCheckEvery + 5*redisTimeout // with the patience for a slow check, and three pauses
		for _, want := range []time.Duration{0, fourth, fourth + 3*redisCheckEvery + redisTimeout} {
			equal(t, "subscribed after", <-subscribed, want)
		}
		cancel()
		watching.Wait()
		time.Sleep(3 * redisCheckEvery) // until the fake has noticed
		if got := logged.String(); strings.Count(got, "\n") != 1 || !strings.Contains(got, "tells of no changes") {
			t.Errorf("not one line: %s", got)
		}
	})
}

// replies are what a server may send, and how many values are in it; 0 is none that Redis
// would send, or that we would read.
var replies = map[string]int{
	"+OK\r\n": 1, ":1\r\n": 1, "$-1\r\n": 1, "$0\r\n\r\n": 1, "$2\r\nab\r\n": 1, "*2\r\n$1\r\na\r\n+b\r\n": 2,
	"*3\r\n$7\r\nmessage\r\n$1\r\nc\r\n$1\r\nk\r\n": 3,
	"": 0, "HTTP/1.1 400 Bad Request\r\n\r\n": 0, "$536870912\r\n": 0, "$9223372036854775808\r\n": 0, "$-2\r\n": 0,
	"$1048577\r\n": 0, "*1000000\r\n": 0, "*0\r\n": 0, "*-1\r\n": 0, "*2\r\n$1\r\na\r\n": 0, "$5\r\nab": 0,
	"$2\r\nabcd": 0, "+OK\n": 0, "\r\n": 0, "+OK": 0, "*3\r\n*3\r\n+a\r\n+b\r\n+c\r\n+d\r\n+e\r\n": 0,
	"*1\r\n-BUSY no\r\n": 0, ":" + strings.Repeat("1", 5000) + "\r\n": 0, "\x00\xff\r\n": 0, "-ERR x\r\n": 0,
}

func FuzzReaderOfRedis(f *testing.F) {
	for reply, want := range replies {
		values, err := readReply(bufio.NewReader(strings.NewReader(reply)))
		if len(values) != want && err == nil || (err == nil) != (want > 0) {
			f.Errorf("%.40q: %q, %v, want %d values", reply, values, err, want)
		}
		f.Add([]byte(reply))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		values, err := readReply(bufio.NewReader(bytes.NewReader(data)))
		if (err == nil) != (len(values) >= 1 && len(values) <= 3) {
			t.Fatalf("%q, %v", values, err)
		}
		for _, value := range values {
			if len(value) > maxRedisValue || !bytes.Contains(data, value) {
				t.Errorf("%q of %q", value, data)
			}
		}
	})
}
