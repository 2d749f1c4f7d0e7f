package main

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

const firefox = "Mozilla/5.0 (Windows NT 10.0; Win64; x64; rv:140.0) Gecko/20100101 Firefox/140.0"

// Where the phone ends.
const confirmed, notConfirmed = "/static/html/loginsucceed.html", "/static/html/loginfailed.html?reason="

// asked begins a login as a browser does, and lets alice scan. It returns the
// ticket, and the secret of the link that her phone gets.
func (w *world) asked(t *testing.T, begin string) (ticket, secret string) {
	t.Helper()
	ticket = w.begin(t, begin, "User-Agent", firefox, "peer", "203.0.113.7:1").Ticket
	return ticket, w.claim(ticket)
}

// claim lets alice scan, and returns the secret of the link that she gets, if any.
func (w *world) claim(ticket string) (secret string) {
	_, shown := w.scan(ticket, "alice", "")
	if link := regexp.MustCompile(`/wechat/confirm\?s=(\w+)`).FindStringSubmatch(shown); link != nil {
		return link[1]
	}
	return ""
}

// answerPhone answers a page that was shown long ago: with "yes", which is the right
// number, with "other", which is one of the wrong ones, or as it is said.
func (w *world) answerPhone(secret, answer string) (location string) {
	k := parseKey(secret[:min(len(secret), 2*len(key{}))])
	switch numbers := choices(k, secret); {
	case answer == "yes":
		answer = number(k)
	case answer == "other":
		answer = numbers[(slices.Index(numbers, number(k))+1)%len(numbers)]
	}
	return w.submit("/wechat/confirm", "s", secret, "shown", "0", "answer", answer).Header().Get("Location")
}

func TestNobodyIsLoggedInBeforeThePhoneConfirms(t *testing.T) {
	for _, begin := range []string{"getloginqr", "getauthqr"} {
		for answer, want := range map[string]struct {
			target string
			status status
		}{
			"yes": {confirmed, statusDone}, "no": {notConfirmed + "declined", statusDeclined},
			"other": {notConfirmed + "number", statusDeclined},
		} {
			w := newWorld(t, "CONFIRM=true")
			ticket, secret := w.asked(t, begin)
			got := w.check(t, ticket, "")
			if got != (pollAnswer{Status: statusScanned, Number: got.Number, ExpiresIn: 300}) || len(got.Number) != 2 {
				t.Errorf("%s: after the scan: %+v", begin, got)
			}
			page := w.do("GET", "/wechat/confirm?s="+secret, "") // which decides nothing
			for _, tell := range []string{"127.0.0.1:80", "Firefox, Windows", "203.0.113.7", ">" + got.Number + "<"} {
				if !strings.Contains(page.Body.String(), tell) {
					t.Errorf("%s: the phone is not told %q: %s", begin, tell, page.Body)
				}
			}
			equal(t, "a wrong secret", w.answerPhone(secret[:len(secret)-1]+"!", "yes"), notConfirmed+"expired")
			equal(t, fmt.Sprintf("%s, %q", begin, answer), w.answerPhone(secret, answer), want.target)
			equal(t, "the secret is good twice", w.answerPhone(secret, "yes"), notConfirmed+"expired")
			equal(t, "the page, once decided", w.do("GET", "/wechat/confirm?s="+secret, "").Code, http.StatusSeeOther)
			got = w.check(t, ticket, "")
			done := got.Login && got.OpenID == "alice" && got.Token != ""
			if nothing := got == (pollAnswer{Status: want.status}); got.Status != want.status || done == nothing {
				t.Errorf("%s, %q: %+v, want %q", begin, answer, got, want.status)
			}
			if strings.Contains(w.logged.String(), secret) {
				t.Error("the secret is in the log")
			}
		}
	}
}

func TestSecretsOfOtherClaimsAndHugeFormsConfirmNothing(t *testing.T) {
	w := newWorld(t, "CONFIRM=true")
	ticket, _ := w.asked(t, "getauthqr")
	other, secret := w.asked(t, "getauthqr")
	id := digest(ticket).String()
	for _, sent := range []string{"", "x", id, id + secret[len(id):], digest("unknown").String() + secret, ticket} {
		w.answerPhone(sent, "yes")
		if out := w.do("GET", "/wechat/confirm?s="+sent, ""); out.Code != http.StatusSeeOther {
			t.Errorf("%q is shown a page: %d", sent, out.Code)
		}
	}
	right := number(digest(other))
	w.submit("/wechat/confirm", "s", secret, "shown", "0", "answer", right, "x", strings.Repeat("&", maxBody))
	if a, b := w.check(t, ticket, ""), w.check(t, other, ""); a.Status != statusScanned || b.Status != statusScanned {
		t.Errorf("%+v, %+v", a, b)
	}
}

// askedPhone opens the phone's page, and returns its form: the hidden fields, and
// the answers that can be pressed, from left to right and downwards.
func (w *world) askedPhone(secret string) (hidden, answers []string) {
	page := w.do("GET", "/wechat/confirm?s="+secret, "").Body.String()
	for _, field := range regexp.MustCompile(`name="(\w+)" value="(\w+)"`).FindAllStringSubmatch(page, -1) {
		if field[1] == "answer" {
			answers = append(answers, field[2])
		} else {
			hidden = append(hidden, field[1], field[2])
		}
	}
	return hidden, answers
}

func TestThePhoneIsNotToldWhichNumberIsRight(t *testing.T) {
	w := newWorld(t, "CONFIRM=true")
	ticket, secret := w.asked(t, "getauthqr")
	_, answers := w.askedPhone(secret)
	if _, again := w.askedPhone(secret); len(answers) != 4 || answers[3] != "no" || !slices.Equal(again, answers) ||
		!slices.Contains(answers, w.check(t, ticket, "").Number) {
		t.Errorf("answers %q, and at another look %q", answers, again)
	}
	const times = 1000
	var ofTickets, ofSecrets [3]int // how often the right one is there: for many tickets, and many secrets of one
	for i := range times {
		k, sent := digest(strconv.Itoa(i)), strconv.Itoa(i)
		numbers := choices(k, sent)
		ofTickets[slices.Index(numbers, number(k))]++
		ofSecrets[slices.Index(choices(digest("ticket"), sent), number(digest("ticket")))]++
		slices.Sort(numbers)
		if len(slices.Compact(numbers)) != 3 || numbers[0] < "10" || len(strings.Join(numbers, "")) != 6 {
			t.Errorf("numbers %q", numbers)
		}
	}
	if slices.Min(ofTickets[:]) < times/4 || slices.Min(ofSecrets[:]) < times/4 {
		t.Errorf("the right number is there: %v, %v", ofTickets, ofSecrets)
	}
}

func TestAnswersWithinASecondDecideNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, "CONFIRM=true")
		ticket, secret := w.asked(t, "getauthqr")
		page, right := "/wechat/confirm?s="+secret, number(digest(ticket))
		answer := func(fields ...string) string {
			return w.submit("/wechat/confirm", fields...).Header().Get("Location")
		}
		hidden, answers := w.askedPhone(secret)
		for _, at := range []time.Duration{0, 999 * time.Millisecond} {
			time.Sleep(at)
			for _, pressed := range answers {
				if got := answer(append(hidden, "answer", pressed)...); got != page {
					t.Errorf("%q after %v leads to %s, want the page again", pressed, at, got)
				}
			}
		}
		time.Sleep(time.Millisecond)
		later, _ := w.askedPhone(secret)
		toCome := strconv.FormatInt(time.Now().Add(time.Hour).UnixMilli(), 10)
		for name, fields := range map[string][]string{
			"to the page shown again":           later,
			"without a time":                    {"s", secret},
			"with a malformed time":             {"s", secret, "shown", "x"},
			"with a time to come":               {"s", secret, "shown", toCome},
			"with a time beyond all that count": {"s", secret, "shown", "9223372036854775807"},
		} {
			if got := answer(append(fields, "answer", right)...); got != page {
				t.Errorf("the right number %s leads to %s", name, got)
			}
		}
		if got := answer(append(hidden, "answer", right)...); got != confirmed || !w.check(t, ticket, "").Login {
			t.Errorf("the right number after a second leads to %s", got)
		}
	})
}

func TestWhatThePageDoesNotAskForIsNoAnswer(t *testing.T) {
	w := newWorld(t, "CONFIRM=true")
	ticket, secret := w.asked(t, "getauthqr")
	right, other := number(digest(ticket)), 10
	numbers := choices(digest(ticket), secret)
	for slices.Contains(numbers, strconv.Itoa(other)) {
		other++
	}
	all := strings.Join(numbers, ",")
	for _, answer := range []string{"", "No", " " + right, "0" + right, strconv.Itoa(other), all} {
		equal(t, fmt.Sprintf("%q leads", answer), w.answerPhone(secret, answer), "/wechat/confirm?s="+secret)
	}
	if w.answerPhone(secret, "yes"); !w.check(t, ticket, "").Login {
		t.Error("the right number no longer counts")
	}
}

func TestASecondScanChangesNoClaim(t *testing.T) {
	w := newWorld(t, "CONFIRM=true")
	ticket, secret := w.asked(t, "getloginqr")
	if _, shown := w.scan(ticket, "bob", ""); strings.Contains(shown, "confirm") {
		t.Errorf("bob is asked to confirm alice's login: %s", shown)
	}
	equal(t, "alice has lost the link, scans again and gets", w.claim(ticket), secret)
	w.answerPhone(secret, "yes")
	if got := w.check(t, ticket, ""); got.OpenID != "alice" || w.claim(ticket) != "" {
		t.Errorf("%+v, or a link after the login", got)
	}
}

// With -race.
func TestThePhoneMayComeBackWhileItIsAsked(t *testing.T) {
	w := newWorld(t, "CONFIRM=true")
	_, secret := w.asked(t, "getauthqr")
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() { w.do("GET", "/wechat/accessusercode?code=again&state="+secret[:2*len(key{})], "") })
		wg.Go(func() { w.do("GET", "/wechat/confirm?s="+secret, "") })
	}
	wg.Wait()
}

func TestACallbackOpenedAgainTellsWhatWasDecided(t *testing.T) {
	for answer, want := range map[string]string{"yes": confirmed, "no": notConfirmed + "declined"} {
		w := newWorld(t, "CONFIRM=true")
		callback := w.press(w.begin(t, "getauthqr").URL, "alice", "allow").Header().Get("Location")
		_, secret, _ := strings.Cut(w.do("GET", callback, "").Header().Get("Location"), "s=")
		w.answerPhone(secret, answer)
		equal(t, fmt.Sprintf("after %q", answer), w.do("GET", callback, "").Header().Get("Location"), want)
	}
}

func TestClaimExpiresWithItsTicket(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, "CONFIRM=true")
		ticket, secret := w.asked(t, "getauthqr")
		time.Sleep(5 * time.Minute)
		got := w.answerPhone(secret, "yes")
		if got != notConfirmed+"expired" || w.check(t, ticket, "").Status != statusExpired {
			t.Errorf("after its time: %s", got)
		}
	})
}

func TestPollHearsOfEachStep(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, "CONFIRM=true")
		qr := w.begin(t, "getauthqr")
		time.AfterFunc(3*time.Second, func() {
			secret := w.claim(qr.Ticket)
			time.Sleep(7 * time.Second)
			w.answerPhone(secret, "yes")
		})
		start := time.Now()
		for _, test := range []struct {
			wait string // and the status that the browser has seen
			want status
			at   time.Duration
		}{
			{"25", statusScanned, 3 * time.Second},
			{"25&status=pending", statusScanned, 3 * time.Second}, // it missed the step
			{"5&status=scanned", statusScanned, 8 * time.Second},
			{"1", statusScanned, 9 * time.Second}, // an old client is not answered in a hurry
			{"25&status=scanned", statusDone, 10 * time.Second},
			{"25&status=done", statusDone, 10 * time.Second},
		} {
			got := w.check(t, qr.Ticket, test.wait).Status
			if at := time.Since(start); got != test.want || at != test.at {
				t.Errorf("wait=%s: %q at %v, want %q at %v", test.wait, got, at, test.want, test.at)
			}
		}
	})
}

func TestThePhoneIsToldTheBrowserAndTheSystem(t *testing.T) {
	for agent, want := range map[string]string{
		firefox: "Firefox, Windows",
		"(Macintosh; Intel Mac OS X 10_15_7) AppleWebKit/537.36 Chrome/140.0 Safari/537.36 Edg/140.0": "Edge, macOS",
		"(iPhone; CPU iPhone OS 18_0 like Mac OS X) AppleWebKit/605.1.15 Version/18.0 Safari/604.1":   "Safari, iPhone",
		// The common browsers of China, which call themselves Chrome or Safari too.
		"(Linux; Android 15) Chrome/140.0 Mobile Safari/537.36 MicroMessenger/8.0.50": "WeChat, Android",
		"(Linux; Android 15) Chrome/120.0 MQQBrowser/15.5 Mobile Safari/537.36":       "QQ, Android",
		"(Windows NT 10.0; Win64; x64) Chrome/86.0 Safari/537.36 360SE":               "360, Windows",
		"(Phone; OpenHarmony 5.0) Chrome/114.0.0.0 Safari/537.36 ArkWeb/4":            "Chrome, HarmonyOS",
		"curl/8.5.0": "curl", "<script>": "Other", "Something (X11; Linux)": "Other, Linux",
	} {
		r := httptest.NewRequest("GET", "/", nil)
		r.Header.Set("User-Agent", agent)
		equal(t, fmt.Sprintf("%.40q", agent), (&server{config: config{confirm: true}}).asker(r).Browser, want)
	}
}
