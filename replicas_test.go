package main

import (
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
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
	t.Setenv("WXSCAN_REDIS", "redis://127.0.0.1:"+startRedis(t).port)
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
	each   []*replica
}

type replica struct {
	cmd    *exec.Cmd
	base   string
	logged *syncBuffer
}

func startReplicas(t *testing.T, redisArgs ...string) *replicas {
	t.Helper()
	address, one, two := freeAddress(t), freeAddress(t), freeAddress(t)
	c := &replicas{t: t, redis: startRedis(t, redisArgs...), public: "http://" + address, client: &http.Client{
		Transport:     &http.Transport{MaxIdleConnsPerHost: 100},
		Timeout:       40 * time.Second,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}
	serveNginx(t, address, t.TempDir(), shipped(t, "replicas.conf", "listen 80;", "listen "+address+";",
		"wxscan-1:8080", one, "wxscan-2:8080", two))
	c.wechat = newDemo(config{appID: "wx0123456789abcdef", appSecret: testSecret, token: testToken,
		publicURL: c.public, apiBase: c.public + "/demo"}, newHTTPClient(), nil)
	simulator := httptest.NewServer(c.wechat)
	t.Cleanup(simulator.Close)
	for _, address := range []string{one, two} {
		cmd := &exec.Cmd{Path: build(t), Env: []string{"ADDR=" + address, "REDIS_URL=redis://127.0.0.1:" + c.redis.port,
			"WECHAT_APPID=wx0123456789abcdef", "WECHAT_APPSECRET=" + testSecret, "WECHAT_TOKEN=" + testToken,
			"PUBLIC_URL=" + c.public, "SESSION_SECRET=" + secretA, "METRICS_TOKEN=letmein", "QR_RATE=0",
			"WECHAT_API_BASE=" + simulator.URL + "/demo", "WECHAT_OPEN_BASE=" + c.public + "/demo"}}
		c.each = append(c.each, &replica{cmd, "http://" + address, nil})
	}
	for i := range c.each {
		c.start(i)
	}
	t.Cleanup(func() { c.stop(syscall.SIGKILL, 0, 1) })
	return c
}

func (c *replicas) start(i int) {
	c.t.Helper()
	r := c.each[i]
	r.logged = new(syncBuffer)
	r.cmd = &exec.Cmd{Path: r.cmd.Path, Env: r.cmd.Env, Stderr: r.logged}
	must(c.t, r.cmd.Start())
	listening(c.t, r.logged)
}

func (c *replicas) stop(signal syscall.Signal, which ...int) {
	for _, i := range which {
		c.each[i].cmd.Process.Signal(signal)
		c.each[i].cmd.Wait()
	}
}

// send returns the answer to a request, with status 0 if there is none.
func (c *replicas) send(method, url, body string) (status int, text string, header http.Header) {
	req, err := http.NewRequestWithContext(c.t.Context(), method, url, strings.NewReader(body))
	if err != nil {
		return 0, err.Error(), nil
	}
	req.Header.Set("Authorization", "Bearer letmein")
	resp, err := c.client.Do(req)
	if err != nil {
		return 0, err.Error(), nil
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	if err != nil {
		return 0, err.Error(), nil
	}
	return resp.StatusCode, string(data), resp.Header
}

// ask returns the answer of a URL as JSON, once it is 200. Browsers try again.
func (c *replicas) ask(url string, v any) (err error) {
	for range 200 {
		status, text, _ := c.send("GET", url, "")
		if status == http.StatusOK {
			return json.Unmarshal([]byte(text), v)
		}
		err = fmt.Errorf("%.60s: %d %s", url, status, text)
		time.Sleep(100 * time.Millisecond)
	}
	return err
}

// poll returns the answer that ends the polls of a ticket.
func (c *replicas) poll(base, ticket string) (answer pollAnswer, err error) {
	for err == nil && !answer.Login && answer.Status != statusExpired {
		err = c.ask(base+"/wechat/checklogin?wait=25&status=pending&ticket="+ticket, &answer)
	}
	return answer, err
}

// A phone is what a phone, or WeChat for it, sends after a scan: each time the same.
func (c *replicas) phone(qr qrAnswer, openID string) (send func(base string) (status int, text string,
	header http.Header)) {
	if strings.Contains(qr.URL, "/demo/q/") {
		query, body, err := c.wechat.config.signedPush(openID, "SCAN", digest(qr.Ticket).String(), "")
		must(c.t, err)
		return func(base string) (int, string, http.Header) {
			return c.send("POST", base+"/wechat/message?"+query.Encode(), string(body))
		}
	}
	callback, err := c.wechat.act(c.t.Context(), strings.TrimSuffix(qr.URL, "#wechat_redirect"), openID, "allow")
	must(c.t, err)
	return func(base string) (int, string, http.Header) {
		return c.send("GET", base+strings.TrimPrefix(callback, c.public), "")
	}
}

// login is one login; between comes after the code is shown, and before the scan.
// WeChat sends again what is not answered with 200, and a person tries again
// when the phone's page says so.
func (c *replicas) login(begin, openID string, between func()) error {
	var qr qrAnswer
	if err := c.ask(c.public+"/wechat/"+begin, &qr); err != nil {
		return err
	}
	var answer pollAnswer
	var err error
	var browser sync.WaitGroup
	browser.Go(func() { answer, err = c.poll(c.public, qr.Ticket) })
	between()
	send := c.phone(qr, openID)
	status, text, header := 0, "", http.Header(nil)
	for range 200 {
		status, text, header = send(c.public)
		if status == http.StatusOK || status == http.StatusSeeOther &&
			!strings.HasSuffix(header.Get("Location"), "unavailable") {
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	browser.Wait()
	if answer.OpenID != openID {
		return fmt.Errorf("%s for %s ends as %+v, %v; the phone: %d %s %s", begin, openID, answer, err, status, text,
			header.Get("Location"))
	}
	return err
}

var bothFlows = []string{"getloginqr", "getauthqr"}

func TestTwoReplicasLoseAndCrossNoLogin(t *testing.T) {
	t.Parallel()
	c := startReplicas(t)
	var people sync.WaitGroup
	for n := range 50 {
		people.Go(func() {
			for i := range 10 {
				between := func() { time.Sleep(rand.N(30 * time.Millisecond)) }
				if err := c.login(bothFlows[i%2], fmt.Sprintf("user-%d-%d", n, i), between); err != nil {
					t.Error(err)
				}
			}
		})
	}
	people.Wait()
	count := func(r *replica) int { return strings.Count(r.logged.String(), `msg="login done"`) }
	eventually(t, "500 logins are logged", func() bool { return count(c.each[0])+count(c.each[1]) == 500 })
	for _, r := range c.each {
		if n := count(r); n < 100 {
			t.Errorf("one replica has done %d of 500 logins", n)
		}
	}
}

func TestAScanReachesTheBrowserAtTheOtherReplicaAtOnce(t *testing.T) {
	c := startReplicas(t, "--appendfsync", "everysec") // Redis' own default
	var medians []time.Duration
	const limit = 15 * time.Millisecond // 3 on an idle machine, but others may be at work here
	for range 10 {
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
		medians = append(medians, all[len(all)/2])
		if all[len(all)/2] <= limit {
			t.Logf("the median is %v; the limit %v", all[len(all)/2], limit)
			return
		}
	}
	t.Errorf("the medians are %v", medians)
}

func TestALoginOutlivesWhatBreaksBetweenCodeAndScan(t *testing.T) {
	for _, test := range []struct {
		name   string
		breaks func(*replicas)
	}{
		{"one replica, and then the other", func(c *replicas) {
			c.stop(syscall.SIGKILL, 0)
			c.start(0)
			c.stop(syscall.SIGKILL, 1)
		}},
		{"both replicas", func(c *replicas) { c.stop(syscall.SIGTERM, 0, 1); c.start(0); c.start(1) }},
		{"Redis, which has its data still",
			func(c *replicas) { c.redis.kill(); time.Sleep(time.Second); c.redis.start() }},
		{"Redis, which hangs for 10 seconds", func(c *replicas) {
			c.redis.freeze()
			time.AfterFunc(10*time.Second, c.redis.thaw)
		}},
		{"Redis, which becomes a replica and a master again", func(c *replicas) {
			other := startRedis(c.t)
			other.follow(c.redis)
			c.redis.follow(other)
			time.AfterFunc(time.Second, func() { c.redis.follow(nil) })
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			c := startReplicas(t)
			var people, shown sync.WaitGroup
			shown.Add(10)
			broken := make(chan struct{})
			for i := range 10 {
				people.Go(func() {
					if err := c.login(bothFlows[i%2], fmt.Sprint("user-", i),
						func() { shown.Done(); <-broken }); err != nil {
						t.Error(err)
					}
				})
			}
			shown.Wait()
			test.breaks(c)
			close(broken)
			people.Wait()
			for _, r := range c.each {
				if text := r.logged.String(); strings.Count(text, "Redis is away") > 1 ||
					strings.Count(text, "Redis is back") > 1 {
					t.Errorf("more than a line each: %s", text)
				}
			}
		})
	}
}

func TestARollingRestartLosesNoLogin(t *testing.T) {
	t.Parallel()
	c := startReplicas(t)
	over := make(chan struct{})
	var people sync.WaitGroup
	for n := range 8 {
		people.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-over:
					return
				default:
				}
				between := func() { time.Sleep(rand.N(100 * time.Millisecond)) }
				if err := c.login(bothFlows[i%2], fmt.Sprintf("user-%d-%d", n, i), between); err != nil {
					t.Error(err)
				}
			}
		})
	}
	for i := range 6 {
		time.Sleep(300 * time.Millisecond)
		c.stop(syscall.SIGTERM, i%2)
		c.start(i % 2)
	}
	close(over)
	people.Wait()
}

func TestAnEmptyRedisHasTheBrowserAskForAnotherCode(t *testing.T) {
	t.Parallel()
	c := startReplicas(t)
	for _, begin := range bothFlows {
		var qr qrAnswer
		must(t, c.ask(c.public+"/wechat/"+begin, &qr))
		time.AfterFunc(100*time.Millisecond, func() { c.redis.kill(); c.redis.empty(); c.redis.start() })
		start := time.Now()
		if answer, err := c.poll(c.public, qr.Ticket); answer.Status != statusExpired || err != nil ||
			time.Since(start) > 5*time.Second {
			t.Errorf("%s: %+v, %v after %v", begin, answer, err, time.Since(start))
		}
		if err := c.login(begin, "alice", func() {}); err != nil {
			t.Error(err)
		}
	}
}

func TestWhileRedisIsAwayEverythingIsAnsweredInTime(t *testing.T) {
	for _, test := range []struct {
		name       string
		goes, back func(*realRedis)
	}{
		{"gone", (*realRedis).kill, (*realRedis).start},
		{"frozen", (*realRedis).freeze, (*realRedis).thaw},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			c := startReplicas(t)
			var scan, auth qrAnswer
			must(t, c.ask(c.public+"/wechat/getloginqr", &scan))
			must(t, c.ask(c.public+"/wechat/getauthqr", &auth))
			push, callback := c.phone(scan, "alice"), c.phone(auth, "bob")
			get := func(path string) func(string) (int, string, http.Header) {
				return func(base string) (int, string, http.Header) { return c.send("GET", base+path, "") }
			}
			test.goes(c.redis)
			push(c.each[0].base) // from here on it is known that Redis is away
			for _, test := range []struct {
				what string
				send func(string) (int, string, http.Header)
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
				start := time.Now()
				status, text, header := test.send(c.each[0].base)
				said := fmt.Sprint(header, text)
				if took := time.Since(start); status != test.want || !strings.Contains(said, test.says) ||
					took > 3*time.Second {
					t.Errorf("%s: %d %s after %v", test.what, status, said, took)
				}
			}
			test.back(c.redis)
			eventually(t, "it is ready again", func() bool {
				status, _, _ := get("/readyz")(c.each[0].base)
				return status == 200
			})
			push(c.each[0].base)
			callback(c.each[0].base)
			for ticket, openID := range map[string]string{scan.Ticket: "alice", auth.Ticket: "bob"} {
				if answer, err := c.poll(c.each[0].base, ticket); answer.OpenID != openID || err != nil {
					t.Errorf("the same again, for %s: %+v, %v", openID, answer, err)
				}
			}
			logged := c.each[0].logged.String()
			if strings.Count(logged, "Redis is away") != 1 || strings.Count(logged, "Redis is back") != 1 ||
				strings.Count(logged, "level=WARN") > 0 {
				t.Errorf("not a line each: %s", logged)
			}
		})
	}
}

func TestARedisThatRefusesEndsTheStartAndAnAbsentOneDoesNot(t *testing.T) {
	shared := func(url string) func(string) string {
		return with("ADDR=127.0.0.1:0", "SESSION_SECRET="+secretA, "REDIS_URL="+url)
	}
	server := startRedis(t, "--requirepass", "opensesame")
	err := run(t.Context(), nil, shared("redis://:hush@127.0.0.1:"+server.port), io.Discard, io.Discard)
	if err == nil || !strings.Contains(err.Error(), "REDIS_URL: Redis answers WRONGPASS") ||
		strings.Contains(err.Error(), "hush") {
		t.Errorf("a wrong password: %v", err)
	}
	_, logged, stop := start(t, shared("redis://"+freeAddress(t)))
	must(t, stop())
	if strings.Count(logged.String(), "level=ERROR") != 1 || !strings.Contains(logged.String(), "Redis is away") {
		t.Errorf("an absent one: %s", logged)
	}
}

func TestReplicasMustShareASessionSecretAndAreNoDemo(t *testing.T) {
	for want, args := range map[string][]string{"SESSION_SECRET": nil, "REDIS_URL": {"-demo"}} {
		err := run(t.Context(), args, only(append(goodSettings[2:], "REDIS_URL=redis://127.0.0.1",
			"WECHAT_APPID=wx1")...), io.Discard, io.Discard)
		if args == nil {
			err = run(t.Context(), args, with("REDIS_URL=redis://127.0.0.1"), io.Discard, io.Discard)
		}
		if err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("%q: %v", args, err)
		}
	}
}

func TestComposeStartsTheReplicasThatNginxAsks(t *testing.T) {
	compose := content(t, "compose.yaml")
	services := named(t, compose, `(?m)^  (wxscan-\d):`)
	if asked := named(t, content(t, "deploy/replicas.conf"), `server (wxscan-\d):8080`); !slices.Equal(services,
		asked) {
		t.Errorf("nginx asks %q, there are %q", asked, services)
	}
	var known []string
	for _, s := range new(config).settings() {
		known = append(known, s.env)
	}
	among(t, known, named(t, compose, `(?m)^      ([A-Z_]+):`), "there is no setting")
}

func TestReplicasFetchNoPlainTokenWhichWouldEndTheOthers(t *testing.T) {
	t.Setenv("WXSCAN_REDIS", "redis://127.0.0.1:"+startRedis(t).port)
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
