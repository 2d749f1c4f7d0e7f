package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
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

// A realRedis is a redis-server on loopback, with its data in a directory of the test's.
type realRedis struct {
	t    *testing.T
	dir  string
	port string
	args []string
	cmd  *exec.Cmd // nil while it is stopped
}

// startRedis starts a redis-server, which ends with the test.
func startRedis(t *testing.T, args ...string) *realRedis {
	t.Helper()
	program(t, "redis-server", "redis-server")
	_, port, err := net.SplitHostPort(freeAddress(t))
	must(t, err)
	s := &realRedis{t: t, dir: t.TempDir(), port: port, args: args}
	s.start()
	t.Cleanup(s.kill)
	return s
}

// start starts the server, with the data it had, and waits until it answers.
func (s *realRedis) start() {
	s.t.Helper()
	args := append([]string{"--port", s.port, "--bind", "127.0.0.1", "--dir", s.dir, "--save", "",
		"--appendonly", "yes", "--appendfsync", "always", "--repl-diskless-sync-delay", "0"}, s.args...)
	s.cmd = exec.Command("redis-server", args...)
	must(s.t, s.cmd.Start())
	for range 500 {
		if conn, err := net.Dial("tcp", "127.0.0.1:"+s.port); err == nil {
			io.WriteString(conn, "PING\r\n")
			answer, _ := bufio.NewReader(conn).ReadString('\n')
			conn.Close()
			if answer != "" && !strings.HasPrefix(answer, "-LOADING") {
				return
			}
		}
		time.Sleep(10 * time.Millisecond)
	}
	s.t.Fatal("redis-server does not answer")
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

// empty forgets the data of a stopped server.
func (s *realRedis) empty() { must(s.t, os.RemoveAll(filepath.Join(s.dir, "appendonlydir"))) }

// do runs a command as the server's administrator would.
func (s *realRedis) do(args ...string) string {
	s.t.Helper()
	value, err := newTestRedis(s.t, "redis://127.0.0.1:"+s.port, nil).do(s.t.Context(), args...)
	must(s.t, err)
	return string(value)
}

// follow makes the server a read-only replica; of nobody, it is a master again.
func (s *realRedis) follow(master *realRedis) {
	s.t.Helper()
	if master == nil {
		s.do("REPLICAOF", "NO", "ONE")
		return
	}
	s.do("REPLICAOF", "127.0.0.1", master.port)
	for range 500 {
		if strings.Contains(s.do("INFO", "replication"), "master_link_status:up") {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	s.t.Fatal("the replica does not follow")
}

// client returns a client of the server, and its log.
func (s *realRedis) client() (*redis, *lockedBuffer) {
	logged := new(lockedBuffer)
	return newTestRedis(s.t, "redis://127.0.0.1:"+s.port, logged), logged
}

// A lockedBuffer is a log that is read while it is written.
type lockedBuffer struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.Write(p)
}

func (b *lockedBuffer) count(word string) int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return strings.Count(b.text.String(), word)
}

func newTestRedis(t testing.TB, rawURL string, logged *lockedBuffer) *redis {
	t.Helper()
	u, err := parseRedisURL(rawURL)
	must(t, err)
	var out io.Writer = io.Discard
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
	for _, test := range []struct{ text, scheme, host, user, password, path string }{
		{"redis://example.org", "redis", "example.org:6379", "", "", ""},
		{"redis://127.0.0.1:1234/5", "redis", "127.0.0.1:1234", "", "", "/5"},
		{"rediss://[::1]/", "rediss", "[::1]:6379", "", "", "/"},
		{"redis://:secret@redis_1:1", "redis", "redis_1:1", "", "secret", ""},
		{"redis://me:s%2Fcr%23t@h:1/0", "redis", "h:1", "me", "s/cr#t", "/0"},
		{"redis://me:a:b@c@h", "redis", "h:6379", "me", "a:b@c", ""},
	} {
		u, err := parseRedisURL(test.text)
		if err != nil {
			t.Errorf("%s: %v", test.text, err)
			continue
		}
		password, _ := u.User.Password()
		got := []string{u.Scheme, u.Host, u.User.Username(), password, u.Path}
		if want := []string{test.scheme, test.host, test.user, test.password, test.path}; !slices.Equal(got, want) {
			t.Errorf("%s: got %q, want %q", test.text, got, want)
		}
	}
}

func TestMalformedRedisURLIsRefusedWithoutItsPassword(t *testing.T) {
	for _, text := range []string{
		"", "secret", "http://:secret@h", "redis:h", "redis://", "redis://:secret@", "redis://secret@h",
		"redis://h:secret",
		"redis://h/secret", "redis://h/-1", "redis://h?db=1", "redis://:secret%zz@h", "redis://:sec#ret@h",
		"redis://:sec/ret@h", "redis://:sec?ret@h", "redis://:secret@h:999999", "redis://:secret@h/1/2", "redis://h h",
		"redis://:@h", " redis://h", "redis://h\n", "redis://:secret@a,b", "redis://[::1",
	} {
		if u, err := parseRedisURL(text); err == nil {
			t.Errorf("%q is taken for %v", text, u)
		} else if strings.Contains(err.Error(), "sec") {
			t.Errorf("%q: %v", text, err)
		}
	}
}

func TestRedisGivesOneNameToOneValue(t *testing.T) {
	r, _ := startRedis(t).client()
	ctx := t.Context()
	if value, err := r.read(ctx, "a"); value != nil || err != nil {
		t.Fatalf("%q, %v before anything is kept", value, err)
	}
	odd := []byte("\r\n$-1\r\n\x00\xff")
	for i, value := range [][]byte{odd, odd, []byte("b")} { // the second is the first again, after a lost answer
		if earlier, err := r.first(ctx, "a", value, time.Minute); (earlier == nil) != (i == 0) || i > 0 &&
			!bytes.Equal(earlier, odd) || err != nil {
			t.Errorf("%d: %q, %v", i, earlier, err)
		}
	}
	if value, err := r.read(ctx, "a"); !bytes.Equal(value, odd) || err != nil {
		t.Errorf("got %q, %v", value, err)
	}
	if earlier, err := r.first(ctx, "empty", nil, time.Minute); earlier != nil || err != nil {
		t.Errorf("%q, %v", earlier, err)
	}
	if value, err := r.read(ctx, "empty"); value == nil || len(value) != 0 || err != nil {
		t.Errorf("an empty value is %#v, %v", value, err)
	}
	big := bytes.Repeat([]byte("x"), maxRedisValue)
	if _, err := r.first(ctx, "big", big, time.Minute); err != nil {
		t.Fatal(err)
	}
	if value, err := r.read(ctx, "big"); !bytes.Equal(value, big) || err != nil {
		t.Errorf("%d bytes, %v", len(value), err)
	}
}

func TestSwapInRedisHasOneWinnerWhoIsToldSoAgain(t *testing.T) {
	r, _ := startRedis(t).client()
	ctx := t.Context()
	r.first(ctx, "k", []byte("0"), time.Minute)
	var won atomic.Int32
	var racers sync.WaitGroup
	for i := range 100 {
		racers.Go(func() {
			next := fmt.Sprintf("next %d", i)
			for range 2 { // as if the first answer was lost
				switch ok, err := r.replace(ctx, "k", "0", next, time.Minute); {
				case err != nil:
					t.Error(err)
				case ok:
					won.Add(1)
				}
			}
		})
	}
	racers.Wait()
	if won.Load() != 2 {
		t.Errorf("%d wins, want one caller's two", won.Load())
	}
	if ok, err := r.replace(ctx, "none", "", "1", time.Minute); ok || err != nil {
		t.Errorf("a swap of nothing: %v, %v", ok, err)
	}
	if ok, err := r.replace(ctx, "none", "", "1", time.Minute); ok || err != nil {
		t.Errorf("a swap of nothing for an empty value: %v, %v", ok, err)
	}
}

func TestValuesInRedisEndWithTheirLife(t *testing.T) {
	server := startRedis(t)
	r, _ := server.client()
	ctx := t.Context()
	r.first(ctx, "a", []byte("1"), time.Hour)
	if ok, err := r.replace(ctx, "a", "1", "2", 90*time.Second); !ok || err != nil {
		t.Fatal(ok, err)
	}
	if left := server.do("PTTL", "wxscan:a"); len(left) != 5 || left > "90000" {
		t.Errorf("%s ms left, want 90000", left)
	}
	if _, err := r.first(ctx, "b", []byte("1"), 0); err != nil { // shorter than Redis knows
		t.Error(err)
	}
	eventually(t, "a value ends", func() bool { value, err := r.read(ctx, "b"); return value == nil && err == nil })
}

// TestARecordOfAnotherVersionCanBeSwapped is for an update of one replica after the other.
func TestARecordOfAnotherVersionCanBeSwapped(t *testing.T) {
	server := startRedis(t)
	r, _ := server.client()
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
	open := startRedis(t)
	locked := startRedis(t, "--requirepass", "secret")
	users := startRedis(t, "--user", "default", "on", "nopass", "~*", "&*", "+@all",
		"--user", "me", "on", ">secret", "~wxscan:*", "&wxscan:*", "-@all",
		"+set", "+get", "+eval", "+publish", "+subscribe", "+select",
		"--user", "other", "on", ">secret", "~other:*", "&*", "+@all",
		"--user", "mute", "on", ">secret", "~*", "resetchannels", "+@all")
	cluster := startRedis(t, "--cluster-enabled", "yes", "--appendonly", "no")
	for _, test := range []struct{ auth, port, db, want string }{
		{"", open.port, "", ""},
		{"", open.port, "/15", ""},
		{"", open.port, "/16", "ERR DB index"},
		{"", locked.port, "", "NOAUTH Authentication required."},
		{":wrongsecret@", locked.port, "", "WRONGPASS invalid username"},
		{":secret@", locked.port, "/1", ""},
		{"me:secret@", users.port, "/1", ""},
		{"nobody:secret@", users.port, "", "WRONGPASS invalid username"},
		{"other:secret@", users.port, "", "NOPERM"},
		{"mute:secret@", users.port, "", "ERR"},
		{"", cluster.port, "", "Cluster is not supported"},
		{"", cluster.port, "/1", "not allowed in cluster mode"},
	} {
		r := newTestRedis(t, "redis://"+test.auth+"127.0.0.1:"+test.port+test.db, nil)
		err := r.check(t.Context())
		_, refused := errors.AsType[refusal](err)
		switch {
		case test.want == "" && err != nil:
			t.Errorf("%+v: %v", test, err)
		case test.want == "":
		case err == nil || !refused || !strings.Contains(err.Error(), test.want):
			t.Errorf("%+v: %v, a refusal: %v", test, err, refused)
		case strings.Contains(err.Error(), "secret"):
			t.Errorf("%+v gives away the password: %v", test, err)
		}
	}
}

func TestARefusalDoesNotQuoteWhatWasSent(t *testing.T) {
	err := explain("ERR unknown command 'AUTH', with args beginning with: 'default' 'secret'")
	if _, refused := errors.AsType[refusal](err); !refused || strings.Contains(err.Error(), "secret") {
		t.Error(err)
	}
}

func TestRedisThatIsRestartedCostsNoCommand(t *testing.T) {
	server := startRedis(t)
	r, logged := server.client()
	ctx := t.Context()
	for range 2 * redisConns { // dial them all
		must(t, r.check(ctx))
	}
	r.first(ctx, "a", []byte("1"), time.Minute)
	server.kill()
	server.start()
	for range 2 * redisConns {
		if value, err := r.read(ctx, "a"); string(value) != "1" || err != nil {
			t.Fatalf("%q, %v", value, err)
		}
	}
	if r.ready() != nil || logged.count("away") != 0 {
		t.Error("Redis counts as away")
	}
}

func TestRedisThatGoesAndComesBackIsLoggedOnceEach(t *testing.T) {
	server := startRedis(t)
	r, logged := server.client()
	ctx := t.Context()
	must(t, r.check(ctx))
	server.kill()
	for range 20 {
		if err := r.check(ctx); !errors.Is(err, errStoreUnavailable) || r.ready() == nil {
			t.Fatal(err, r.ready())
		}
	}
	server.empty()
	server.start()
	must(t, r.check(ctx))
	must(t, r.check(ctx))
	if r.ready() != nil || logged.count("Redis is away") != 1 || logged.count("Redis is back") != 1 {
		t.Error("not one line each")
	}
}

func TestFrozenRedisHoldsNobodyForThreeSeconds(t *testing.T) {
	server := startRedis(t)
	r, _ := server.client()
	ctx := t.Context()
	for range redisConns {
		must(t, r.check(ctx))
	}
	r.first(ctx, "a", []byte("1"), time.Minute)
	server.freeze()
	var callers sync.WaitGroup
	for range 5 * redisConns {
		callers.Go(func() {
			start := time.Now()
			_, err := r.read(ctx, "a")
			if took := time.Since(start); !errors.Is(err, errStoreUnavailable) || took > 2500*time.Millisecond {
				t.Errorf("%v after %v", err, took)
			}
		})
	}
	callers.Wait()
	server.thaw()
	if value, err := r.read(ctx, "a"); string(value) != "1" || err != nil {
		t.Errorf("thawed: %q, %v", value, err)
	}
}

func TestReadOnlyReplicaIsAwayUntilItIsPromoted(t *testing.T) {
	master, server := startRedis(t), startRedis(t)
	r, logged := server.client()
	ctx := t.Context()
	must(t, r.check(ctx))
	server.follow(master)
	for range 5 {
		err := r.check(ctx)
		if _, refused := errors.AsType[refusal](err); refused || !errors.Is(err, errStoreUnavailable) {
			t.Fatal(err)
		}
		if _, err := r.replace(ctx, "none", "", "1", time.Minute); err != nil { // which only reads
			t.Error(err)
		}
		if _, err := r.read(ctx, "a"); err != nil || r.ready() == nil {
			t.Errorf("%v, up: %v", err, r.ready())
		}
	}
	server.follow(nil)
	must(t, r.check(ctx))
	if logged.count("Redis is away") != 1 || logged.count("Redis is back") != 1 {
		t.Error("not one line each")
	}
}

func TestWatchHearsOfSwapsAlsoAfterARestart(t *testing.T) {
	server := startRedis(t)
	r, logged := server.client()
	other, _ := server.client()
	ctx, cancel := context.WithCancel(t.Context())
	changed, resubscribed, ended := make(chan string, 100), make(chan bool, 100), make(chan bool)
	go func() {
		defer close(ended)
		r.watch(ctx, func(name string) { changed <- name }, func() { resubscribed <- true })
	}()
	<-resubscribed
	swap := func(name string) {
		t.Helper()
		other.first(ctx, name, []byte("1"), time.Minute)
		if ok, err := other.replace(ctx, name, "1", "2", time.Minute); !ok || err != nil {
			t.Fatal(ok, err)
		}
		if got := <-changed; got != name {
			t.Errorf("got %q, want %q", got, name)
		}
	}
	swap("a")
	server.kill()
	server.start()
	<-resubscribed
	swap("b")
	cancel()
	<-ended
	if logged.count("level") != 0 {
		t.Error("the subscription writes to the log")
	}
}

func TestWatchSaysOnceThatItMayNotSubscribe(t *testing.T) {
	server := startRedis(t, "--user", "me", "on", ">secret", "~*", "&*", "+@all", "-subscribe")
	logged := new(lockedBuffer)
	r := newTestRedis(t, "redis://me:secret@127.0.0.1:"+server.port, logged)
	ctx, cancel := context.WithTimeout(t.Context(), 1500*time.Millisecond)
	defer cancel()
	r.watch(ctx, func(string) {}, func() { t.Error("subscribed") })
	if logged.count("tells of no changes") != 1 || r.ready() != nil {
		t.Error("not one line")
	}
}

func TestHealthIsKnownWhileNobodyAsks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		var away atomic.Bool
		r, logged := fakeRedis(t, func(_ int, conn net.Conn, commands *bufio.Reader) {
			for args := readCommand(commands); args != nil && !away.Load(); args = readCommand(commands) {
				io.WriteString(conn, ":1\r\n")
			}
		})
		var watching sync.WaitGroup
		watching.Go(func() { r.watchHealth(ctx) })
		for _, up := range []bool{true, false, false, true} {
			away.Store(!up)
			time.Sleep(redisCheckEvery)
			if synctest.Wait(); up != (r.ready() == nil) {
				t.Errorf("up is %v, want %v", r.ready(), up)
			}
		}
		cancel()
		watching.Wait()
		if logged.count("Redis is away") != 1 || logged.count("Redis is back") != 1 {
			t.Error("not one line each")
		}
	})
}

func TestRedisThatDoesOnlyHalfIsAwayAllTheTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		r, logged := fakeRedis(t, func(_ int, conn net.Conn, commands *bufio.Reader) {
			for args := readCommand(commands); args != nil; args = readCommand(commands) {
				answer := map[string]string{"SET": "$-1\r\n", "EVAL": "-NOPERM x\r\n"}[args[0]]
				io.WriteString(conn, answer)
			}
		})
		r.watchHealth(ctx)
		if r.ready() == nil || logged.count("level") != 1 {
			t.Errorf("%v, %d lines", r.ready(), logged.count("level"))
		}
	})
}

func TestRedissTrustsTheCertificatesOfREDIS_CA(t *testing.T) {
	signer := httptest.NewTLSServer(nil) // has a certificate for 127.0.0.1
	defer signer.Close()
	dir := t.TempDir()
	ca, keyFile := filepath.Join(dir, "ca.pem"), filepath.Join(dir, "key.pem")
	private, err := x509.MarshalPKCS8PrivateKey(signer.TLS.Certificates[0].PrivateKey)
	must(t, err)
	write := func(file, kind string, der []byte) {
		must(t, os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600))
	}
	write(ca, "CERTIFICATE", signer.Certificate().Raw)
	write(keyFile, "PRIVATE KEY", private)
	address := freeAddress(t)
	_, port, _ := net.SplitHostPort(address)
	startRedis(t, "--tls-port", port, "--tls-cert-file", ca, "--tls-key-file", keyFile,
		"--tls-ca-cert-file", ca, "--tls-auth-clients", "no")
	r := newTestRedis(t, "rediss://"+address, nil)
	if err := r.check(t.Context()); err == nil || !strings.Contains(err.Error(), "certificate") {
		t.Errorf("an unknown certificate: %v", err)
	}
	roots, err := readCA(ca)
	must(t, err)
	must(t, newRedis(r.url, roots, "wxscan:", slog.New(slog.DiscardHandler)).check(t.Context()))
	if _, err := readCA(keyFile); err == nil {
		t.Error("a key is taken for a certificate")
	}
}

// fakeRedis returns a client, for a bubble, each of whose connections is served
// by serve, which is told which one it is, from 1.
func fakeRedis(t *testing.T, serve func(n int, conn net.Conn, commands *bufio.Reader)) (*redis, *lockedBuffer) {
	t.Helper()
	logged := new(lockedBuffer)
	r := newTestRedis(t, "redis://fake", logged)
	var dialed atomic.Int32
	r.dial = func(context.Context, string, string) (net.Conn, error) {
		ours, theirs := net.Pipe()
		n := int(dialed.Add(1))
		go func() { // until either end closes
			defer theirs.Close()
			serve(n, theirs, bufio.NewReader(theirs))
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

func TestWhatIsNotRedisFailsWithinItsTime(t *testing.T) {
	for _, answer := range []string{
		"", "HTTP/1.1 400 Bad Request\r\n\r\n", "$536870912\r\n", "$9223372036854775808\r\n", "$-2\r\n", "$1048577\r\n",
		"*1000000\r\n", "*0\r\n", "*-1\r\n", "*2\r\n$1\r\na\r\n", "$5\r\nab", "$2\r\nabcd", "+OK\n", "\r\n", "+OK",
		"*3\r\n*3\r\n+a\r\n+b\r\n+c\r\n+d\r\n+e\r\n", "*1\r\n-ERR no\r\n", ":" + strings.Repeat("1", 5000),
		"\x00\xff\r\n",
		"*2\r\n+a\r\n+b\r\n", "-LOADING Redis is loading the dataset in memory\r\n",
	} {
		for _, silent := range []bool{false, true} { // after its answer
			synctest.Test(t, func(t *testing.T) {
				r, _ := fakeRedis(t, func(_ int, conn net.Conn, commands *bufio.Reader) {
					readCommand(commands)
					io.WriteString(conn, answer)
					if silent {
						io.Copy(io.Discard, commands)
					}
				})
				start := time.Now()
				value, err := r.read(t.Context(), "a")
				if value != nil || !errors.Is(err, errStoreUnavailable) || time.Since(start) > redisTimeout ||
					r.ready() == nil {
					t.Errorf("%q: %q, %v after %v", answer, value, err, time.Since(start))
				}
			})
		}
	}
}

func TestConnectionCutInAnAnswerCostsNoCommandUnlessItWasNew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, _ := fakeRedis(t, func(n int, conn net.Conn, commands *bufio.Reader) {
			readCommand(commands)
			io.WriteString(conn, "$1\r\n1\r\n")
			if readCommand(commands); n <= redisConns {
				io.WriteString(conn, "$1\r\n") // and no more
				return
			}
			io.WriteString(conn, "$1\r\n2\r\n")
		})
		for _, want := range []string{"1", "1"} { // on a connection of its own; on an old one that is cut
			for range redisConns {
				if value, err := r.read(t.Context(), "a"); string(value) != want || err != nil {
					t.Fatalf("got %q, %v, want %q", value, err, want)
				}
			}
		}
	})
}

func TestFailoverSendsTheCommandToTheNewMaster(t *testing.T) {
	for _, code := range []string{"READONLY You can't write", "LOADING x", "MASTERDOWN x"} {
		synctest.Test(t, func(t *testing.T) {
			var failedOver atomic.Bool
			r, logged := fakeRedis(t, func(n int, conn net.Conn, commands *bufio.Reader) {
				for args := readCommand(commands); args != nil; args = readCommand(commands) {
					answer := ":1\r\n"
					if failedOver.Load() && n <= redisConns {
						answer = "-" + code + "\r\n"
					}
					io.WriteString(conn, answer)
				}
			})
			for i := range 3 * redisConns {
				failedOver.Store(i >= redisConns)
				if won, err := r.replace(t.Context(), "a", "", "", time.Minute); !won || err != nil {
					t.Fatal(won, err)
				}
			}
			if logged.count("level") != 0 {
				t.Error("logged")
			}
		})
	}
}

func TestEndOfTheContextCutsNoCommandOff(t *testing.T) {
	r, _ := startRedis(t).client()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := r.first(ctx, "a", []byte("1"), time.Minute); err != nil {
		t.Error(err)
	}
}

func TestASubscriptionThatHearsNotEvenOfChecksIsReplaced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		var dialed atomic.Int32
		r, _ := fakeRedis(t, func(n int, conn net.Conn, commands *bufio.Reader) {
			dialed.Store(int32(n))
			readCommand(commands)
			io.WriteString(conn, "*3\r\n$9\r\nsubscribe\r\n$14\r\nwxscan:changed\r\n:1\r\n")
			for range 3 {
				time.Sleep(redisCheckEvery)
				if _, err := io.WriteString(conn,
					"*3\r\n$7\r\nmessage\r\n$14\r\nwxscan:changed\r\n$7\r\ncheck:X\r\n"); err != nil {
					return
				}
			}
			io.Copy(io.Discard, commands)
		})
		start, resubscribed := time.Now(), make(chan time.Duration, 10)
		var watching sync.WaitGroup
		watching.Go(func() {
			r.watch(ctx, func(string) {}, func() { resubscribed <- time.Since(start) })
		})
		want := 4*redisCheckEvery + 3*redisTimeout // with the patience for a slow check, and the pause
		if first, second := <-resubscribed, <-resubscribed; first != 0 || second != want {
			t.Errorf("subscribed after %v and %v", first, second)
		}
		cancel()
		watching.Wait()
		time.Sleep(redisCheckEvery) // until the fake has noticed
		if dialed.Load() != 2 {
			t.Errorf("%d connections", dialed.Load())
		}
	})
}

func TestASubscriptionHearsOfItsOwnChecks(t *testing.T) {
	r, _ := startRedis(t).client()
	ctx, cancel := context.WithCancel(t.Context())
	heard, ended := make(chan string, 10), make(chan bool)
	go func() {
		defer close(ended)
		r.watch(ctx, func(name string) { heard <- name }, func() { heard <- "subscribed" })
	}()
	<-heard
	must(t, r.check(ctx))
	if name := <-heard; !strings.HasPrefix(name, "check:") {
		t.Error(name)
	}
	cancel()
	<-ended
}

func FuzzReaderOfRedis(f *testing.F) {
	for _, seed := range []string{"+OK\r\n", ":1\r\n", "$-1\r\n", "$0\r\n\r\n", "$2\r\nab\r\n", "-ERR x\r\n",
		"*3\r\n$7\r\nmessage\r\n$1\r\nc\r\n$1\r\nk\r\n", "*3\r\n*3\r\n+a\r\n+b\r\n+c\r\n+d\r\n+e\r\n",
		"$536870912\r\n"} {
		f.Add([]byte(seed))
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
