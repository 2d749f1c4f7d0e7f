package main

import (
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os/exec"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// TestWhatHoldsInMemoryHoldsInRedis has tests of a ticket's life, of theft, replay
// and confirmation run once more, on a real Redis.
func TestWhatHoldsInMemoryHoldsInRedis(t *testing.T) {
	t.Setenv("WXSCAN_REDIS", startRedis(t).url())
	for _, test := range []func(*testing.T){
		TestATicketAndItsResultEndToTheNanosecond, TestAScanLeavesTimeToDecide, TestATicketIsIssuedOnceForItsFlow,
		TestAllWaitersWakeAtOnce, TestWaitEnds, TestNoWakeUpIsLost, TestOneCallWinsAnyRace,
		TestTheFirstCodeThatIsSettledLogsIn, TestInvalidCodesDoNotUseUpATicket,
		TestACodeWhoseReplicaDiedIsClaimedAgain,
		TestLogin, TestCallback, TestOnlyAFetchOfOurOwnBringsASession, TestMadeUpCodesDenyNobodyTheLogin,
		TestAPhotographOfTheCodeTakesNoLogin, TestOneSignatureCarriesOneBody, TestAPushIsMatchedByItsScene,
		TestPassiveReplyGoesToTheFirstWhoHasScanned,
		TestNobodyIsLoggedInBeforeThePhoneConfirms, TestASecondScanChangesNoClaim,
		TestACallbackOpenedAgainTellsWhatWasDecided, TestPollHearsOfEachStep,
		TestWhatThePageDoesNotAskForIsNoAnswer, TestAnswersWithinASecondDecideNothing,
	} {
		name := runtime.FuncForPC(reflect.ValueOf(test).Pointer()).Name()
		t.Run(strings.TrimPrefix(name, "wxscan.Test"), test)
	}
}

// Replicas are two processes of wxscan that share a Redis, behind nginx as
// deploy/ says, and the WeChat that they talk to.
type replicas struct {
	t      *testing.T
	redis  *realRedis
	public string // nginx
	wechat *demo
	client *http.Client
	each   [2]replica
}

type replica struct {
	*exec.Cmd
	base   string
	logged *syncBuffer
}

func startReplicas(t *testing.T, redisArgs ...string) *replicas {
	t.Helper()
	address, one, two := freeAddress(t), freeAddress(t), freeAddress(t)
	c := &replicas{t: t, redis: startRedis(t, redisArgs...), public: "http://" + address, client: &http.Client{
		Transport:     &http.Transport{MaxIdleConnsPerHost: 100},
		Timeout:       40 * time.Second,
		CheckRedirect: noRedirect,
	}}
	serveNginx(t, address, t.TempDir(), shipped(t, "replicas.conf", "listen 80;", "listen "+address+";",
		"wxscan-1:8080", one, "wxscan-2:8080", two))
	c.wechat = newDemo(config{appID: "wx0123456789abcdef", appSecret: testSecret, token: testToken,
		publicURL: c.public, apiBase: c.public + "/demo"}, newHTTPClient(), nil)
	simulator := newLocalServer(t, c.wechat)
	for i, address := range []string{one, two} {
		c.each[i] = replica{base: "http://" + address, Cmd: &exec.Cmd{Path: build(t), Env: []string{
			"ADDR=" + address, "REDIS_URL=" + c.redis.url(), "PUBLIC_URL=" + c.public, "QR_RATE=0",
			"WECHAT_APPID=wx0123456789abcdef", "WECHAT_APPSECRET=" + testSecret, "WECHAT_TOKEN=" + testToken,
			"SESSION_SECRET=" + secretA, "METRICS_TOKEN=letmein",
			"WECHAT_API_BASE=" + simulator + "/demo", "WECHAT_OPEN_BASE=" + c.public + "/demo"}}}
		c.start(i)
	}
	t.Cleanup(func() { c.stop(syscall.SIGKILL, 0, 1) })
	return c
}

func (c *replicas) start(i int) {
	c.t.Helper()
	r := &c.each[i]
	r.logged = new(syncBuffer)
	r.Cmd = &exec.Cmd{Path: r.Path, Env: r.Env, Stderr: r.logged}
	must(c.t, r.Start())
	listening(c.t, r.logged)
}

func (c *replicas) stop(signal syscall.Signal, which ...int) {
	for _, i := range which {
		c.each[i].Process.Signal(signal)
		c.each[i].Wait()
	}
}

func (c *replicas) send(method, url, body string) response {
	return send(c.client, method, url, body, "Authorization", "Bearer letmein")
}

// again makes a request until it is not refused, for 20 seconds, as browsers, WeChat and
// people do.
func again(request func() response) (got response) {
	for range 200 {
		got = request()
		if got.StatusCode == 200 ||
			got.StatusCode == 303 && !strings.HasSuffix(got.Header.Get("Location"), "unavailable") {
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	return got
}

// ask returns the answer of a URL as JSON, once it is 200.
func (c *replicas) ask(url string, v any) error {
	got := again(func() response { return c.send("GET", url, "") })
	if err := json.Unmarshal([]byte(got.body), v); err != nil || got.StatusCode != 200 {
		return fmt.Errorf("%.60s: %d %s", url, got.StatusCode, got.body)
	}
	return nil
}

// poll returns the answer that ends the polls of a ticket.
func (c *replicas) poll(base, ticket string) (answer pollAnswer, err error) {
	for err == nil && !answer.Login && answer.Status != statusExpired {
		err = c.ask(base+"/wechat/checklogin?wait=25&status=pending&ticket="+ticket, &answer)
	}
	return answer, err
}

// phone returns what a phone, or WeChat for it, sends to base after a scan: each
// time the same.
func (c *replicas) phone(qr qrAnswer, openID string) (send func(base string) response) {
	if strings.Contains(qr.URL, "/demo/q/") {
		query, body, err := c.wechat.config.signedPush(openID, "SCAN", digest(qr.Ticket).String(), "")
		must(c.t, err)
		return func(base string) response {
			return c.send("POST", base+"/wechat/message?"+query.Encode(), string(body))
		}
	}
	opened, err := c.wechat.open(strings.TrimSuffix(qr.URL, "#wechat_redirect"))
	must(c.t, err)
	callback, err := c.wechat.press(c.t.Context(), opened, openID, "allow", "")
	must(c.t, err)
	return func(base string) response { return c.send("GET", base+strings.TrimPrefix(callback, c.public), "") }
}

// login is one login, by turns in each flow; between comes after the code is shown,
// and before the scan.
func (c *replicas) login(i int, openID string, between func()) {
	var qr qrAnswer
	if err := c.ask(c.public+"/wechat/"+bothFlows[i%2], &qr); err != nil {
		c.t.Error(err)
		return
	}
	var answer pollAnswer
	var err error
	var browser sync.WaitGroup
	browser.Go(func() { answer, err = c.poll(c.public, qr.Ticket) })
	between()
	send := c.phone(qr, openID)
	got := again(func() response { return send(c.public) })
	if browser.Wait(); answer.OpenID != openID || err != nil {
		c.t.Errorf("%s for %s ends as %+v, %v; the phone: %+v", bothFlows[i%2], openID, answer, err, got)
	}
}

var bothFlows = []string{"getloginqr", "getauthqr"}

// crowd has people log in at once, so many times each, and scan within a time. It is
// done when all are.
func (c *replicas) crowd(people, logins int, within time.Duration) *sync.WaitGroup {
	var all sync.WaitGroup
	for n := range people {
		all.Go(func() {
			for i := range logins {
				c.login(i, fmt.Sprintf("user-%d-%d", n, i), func() { time.Sleep(rand.N(within)) })
			}
		})
	}
	return &all
}

func TestTwoReplicasLoseAndCrossNoLogin(t *testing.T) {
	t.Parallel()
	c := startReplicas(t)
	c.crowd(50, 10, 30*time.Millisecond).Wait()
	count := func(i int) int { return strings.Count(c.each[i].logged.String(), `msg="login done"`) }
	eventually(t, "500 logins are logged", func() bool { return count(0)+count(1) == 500 })
	if n := count(0); n < 100 || n > 400 {
		t.Errorf("one replica has done %d of 500 logins", n)
	}
}

func TestARollingRestartLosesNoLogin(t *testing.T) {
	t.Parallel()
	c := startReplicas(t)
	people := c.crowd(8, 15, 150*time.Millisecond)
	for i := range 4 {
		time.Sleep(200 * time.Millisecond)
		c.stop(syscall.SIGTERM, i%2)
		c.start(i % 2)
	}
	people.Wait()
}

func TestAScanReachesTheBrowserAtTheOtherReplicaAtOnce(t *testing.T) {
	c := startReplicas(t)
	const limit = 15 * time.Millisecond // 3 on an idle machine, but others may be at work here
	median := time.Hour
	for tries := 0; median > limit && tries < 50; tries++ {
		var all []time.Duration
		for i := range 21 {
			var qr qrAnswer
			must(t, c.ask(c.public+"/wechat/"+bothFlows[i%2], &qr))
			send := c.phone(qr, "alice")
			sent := make(chan time.Time, 1)
			time.AfterFunc(10*time.Millisecond, func() { sent <- time.Now(); send(c.each[0].base) })
			answer, err := c.poll(c.each[1].base, qr.Ticket)
			if all = append(all, time.Since(<-sent)); answer.OpenID != "alice" || err != nil {
				t.Errorf("%+v, %v", answer, err)
			}
		}
		slices.Sort(all)
		median = all[len(all)/2]
		t.Logf("the median is %v; the limit %v", median, limit)
	}
	if median > limit {
		t.Error("never within it")
	}
}

func TestALoginOutlivesWhatBreaksBetweenCodeAndScan(t *testing.T) {
	t.Parallel()
	for name, breaks := range map[string]func(*replicas){
		"one replica, and then the other": func(c *replicas) {
			c.stop(syscall.SIGKILL, 0)
			c.start(0)
			c.stop(syscall.SIGKILL, 1)
		},
		"both replicas": func(c *replicas) { c.stop(syscall.SIGTERM, 0, 1); c.start(0); c.start(1) },
		"Redis, which has its data still": func(c *replicas) {
			c.redis.kill()
			time.Sleep(time.Second)
			c.redis.start()
		},
		"Redis, which hangs for 10 seconds": func(c *replicas) {
			c.redis.freeze()
			time.AfterFunc(10*time.Second, c.redis.thaw)
		},
		"Redis, which becomes a replica and a master again": func(c *replicas) {
			other := startRedis(c.t)
			other.follow(c.redis)
			c.redis.follow(other)
			time.AfterFunc(time.Second, func() { c.redis.do("REPLICAOF", "NO", "ONE") })
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := startReplicas(t, durable...)
			var people, shown sync.WaitGroup
			shown.Add(10)
			broken := make(chan struct{})
			for i := range 10 {
				people.Go(func() { c.login(i, fmt.Sprint("user-", i), func() { shown.Done(); <-broken }) })
			}
			shown.Wait()
			breaks(c)
			close(broken)
			people.Wait()
			for _, r := range c.each {
				if text := r.logged.String(); strings.Count(text, "is away") > 1 || strings.Count(text, "is back") > 1 {
					t.Errorf("more than a line each: %s", text)
				}
			}
		})
	}
}

func TestAnEmptyRedisHasTheBrowserAskForAnotherCode(t *testing.T) {
	t.Parallel()
	c := startReplicas(t)
	tickets := make([]qrAnswer, 2)
	for i, begin := range bothFlows {
		must(t, c.ask(c.public+"/wechat/"+begin, &tickets[i]))
	}
	time.AfterFunc(100*time.Millisecond, func() { c.redis.kill(); c.redis.start() })
	start := time.Now()
	for i, qr := range tickets {
		if answer, err := c.poll(c.public, qr.Ticket); answer.Status != statusExpired || err != nil ||
			time.Since(start) > 5*time.Second {
			t.Errorf("%+v, %v after %v", answer, err, time.Since(start))
		}
		c.login(i, "alice", func() {})
	}
}

func TestWhileRedisIsAwayEverythingIsAnsweredInTime(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]struct{ goes, back func(*realRedis) }{
		"gone":   {(*realRedis).kill, (*realRedis).start},
		"frozen": {(*realRedis).freeze, (*realRedis).thaw},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := startReplicas(t, durable...)
			base := c.each[0].base
			var scan, auth qrAnswer
			must(t, c.ask(c.public+"/wechat/getloginqr", &scan))
			must(t, c.ask(c.public+"/wechat/getauthqr", &auth))
			push, callback := c.phone(scan, "alice"), c.phone(auth, "bob")
			get := func(path string) func(string) response {
				return func(base string) response { return c.send("GET", base+path, "") }
			}
			isReady := func() bool { return get("/readyz")(base).StatusCode == 200 }
			change.goes(c.redis)
			eventually(t, "it is noticed, while nobody asks", func() bool { return !isReady() })
			var answers sync.WaitGroup
			for _, test := range []struct {
				what string
				send func(base string) response
				want int
				says string // header and body
			}{
				{"a push", push, 500, "store_unavailable"},
				{"a callback", callback, 303, "loginfailed.html?reason=unavailable"},
				{"a poll", get("/wechat/checklogin?ticket=" + scan.Ticket), 503, "store_unavailable"},
				{"a poll that waits", get("/wechat/checklogin?wait=25&ticket=" + scan.Ticket), 503, "Retry-After:[5]"},
				{"a code", get("/wechat/getloginqr"), 503, "Retry-After:[5]"},
				{"a code of flow B", get("/wechat/getauthqr"), 503, "store_unavailable"},
				{"a picture", get("/wechat/qr.png?ticket=" + scan.Ticket), 503, "store_unavailable"},
				{"a link to confirm", get("/wechat/confirm?s=x"), 303, "loginfailed.html?reason=unavailable"},
				{"readiness", get("/readyz"), 503, "store_unavailable"},
				{"health", get("/healthz"), 200, "ok"},
				{"metrics", get("/metrics"), 200, "wxscan_store_up 0"},
				{"a session", get("/wechat/session"), 401, "no_session"},
				{"the login page", get("/"), 200, "wxscan.js"},
				{"the URL check", get("/wechat/message?echostr=437&" + c.wechat.config.signedQuery().Encode()), 200,
					"437"},
			} {
				for range 4 { // more at once than there are connections to Redis
					answers.Go(func() {
						start := time.Now()
						got := test.send(base)
						said := fmt.Sprint(got.Header, got.body)
						if took := time.Since(start); got.StatusCode != test.want ||
							!strings.Contains(said, test.says) || took > 3*time.Second {
							t.Errorf("%s: %d %s after %v", test.what, got.StatusCode, said, took)
						}
					})
				}
			}
			answers.Wait()
			change.back(c.redis)
			eventually(t, "it is ready again", isReady)
			push(base)
			callback(base)
			for ticket, openID := range map[string]string{scan.Ticket: "alice", auth.Ticket: "bob"} {
				if answer, err := c.poll(base, ticket); answer.OpenID != openID || err != nil {
					t.Errorf("the same again, for %s: %+v, %v", openID, answer, err)
				}
			}
			logged := c.each[0].logged.String()
			if oneLineEach(t, logged); strings.Contains(logged, "level=WARN") {
				t.Errorf("more than these: %s", logged)
			}
		})
	}
}

func TestARedisThatRefusesEndsTheStartAndAnAbsentOneDoesNot(t *testing.T) {
	server := startRedis(t, "--requirepass", "opensesame")
	wrong := "REDIS_URL=redis://:hush@127.0.0.1:" + server.port
	for _, test := range []struct {
		getenv func(string) string
		args   []string
		want   string
	}{
		{with("SESSION_SECRET="+secretA, wrong), nil, "REDIS_URL: Redis answers WRONGPASS"},
		{with(wrong), nil, "SESSION_SECRET: must be set with REDIS_URL"}, // for sessions that each replica checks
		{only(wrong), []string{"-demo"}, "REDIS_URL: must not be set with -demo"},
	} {
		err := run(t.Context(), append(test.args, "-addr", "127.0.0.1:0"), test.getenv, io.Discard, io.Discard)
		if !strings.HasPrefix(fmt.Sprint(err), test.want) || strings.Contains(fmt.Sprint(err), "hush") {
			t.Errorf("%v, want %s", err, test.want)
		}
	}
	absent := with("SESSION_SECRET="+secretA, "REDIS_URL=redis://"+freeAddress(t))
	_, logged, stop := start(t, absent, "-addr", "127.0.0.1:0")
	must(t, stop())
	if strings.Count(logged.String(), "level=ERROR") != 1 || !strings.Contains(logged.String(), "Redis is away") {
		t.Errorf("an absent one: %s", logged)
	}
}

func TestReplicasFetchNoPlainTokenWhichWouldEndTheOthers(t *testing.T) {
	t.Setenv("WXSCAN_REDIS", startRedis(t).url())
	w := newWorld(t)
	w.setFault(func(rw http.ResponseWriter, r *http.Request) bool {
		isStable := strings.HasSuffix(r.URL.Path, "/stable_token")
		if isStable {
			http.NotFound(rw, r)
		}
		return isStable
	})
	if out := w.do("GET", "/wechat/getloginqr", ""); out.Code == 200 || w.called("/cgi-bin/token") != 0 {
		t.Errorf("%d, %d plain tokens", out.Code, w.called("/cgi-bin/token"))
	}
}
