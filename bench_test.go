package main

import (
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"testing"

	"github.com/skip2/go-qrcode"
)

// nobody is a client that does not look at what it is answered.
type nobody struct{ header http.Header }

func (n nobody) Header() http.Header         { return n.header }
func (n nobody) Write(p []byte) (int, error) { return len(p), nil }
func (n nobody) WriteHeader(int)             {}

// floor is the cheapest handler of net/http: it reads the body, and answers
// constant bytes.
func floor(w http.ResponseWriter, r *http.Request) {
	io.Copy(io.Discard, r.Body)
	w.Header().Set("Content-Type", "application/json")
	w.Write(make([]byte, 56))
}

// beside runs work after its floor, and reports how much of the floor's rate it
// reaches: 1 is as fast.
func beside(b *testing.B, name string, floor, work func(b *testing.B)) {
	var least float64 // nanoseconds
	each := func(b *testing.B) float64 { return float64(b.Elapsed()) / float64(b.N) }
	b.Run(name+"/floor", func(b *testing.B) {
		b.ReportAllocs()
		floor(b)
		least = each(b)
	})
	b.Run(name, func(b *testing.B) {
		b.ReportAllocs()
		work(b)
		b.ReportMetric(least/each(b), "of-floor")
	})
}

// serveAll lets h serve requests that prepare makes, a thousand at a time.
func serveAll(h http.HandlerFunc, prepare func(i int) *http.Request) func(b *testing.B) {
	return func(b *testing.B) {
		requests := make([]*http.Request, 1000)
		for i := 0; b.Loop(); i++ {
			if i%len(requests) == 0 {
				b.StopTimer()
				for j := range requests {
					requests[j] = prepare(i + j)
				}
				b.StartTimer()
			}
			h(nobody{make(http.Header, 8)}, requests[i%len(requests)])
		}
	}
}

func quietServer(b *testing.B, tickets int) *server {
	c, err := parseConfig(nil, with("MAX_TICKETS=2000000", "TICKET_TTL=24h", "QR_RATE=0"), io.Discard)
	must(b, err)
	s := newServer(c, slog.New(slog.DiscardHandler))
	for i := range tickets {
		must(b, s.tickets.begin(b.Context(), "ticket"+strconv.Itoa(i), flowScan, "http://weixin.qq.com/q/x", asker{}))
	}
	return s
}

// BenchmarkPoll is a poll without wait, through all of the server's handlers.
func BenchmarkPoll(b *testing.B) {
	for _, tickets := range []int{10, 1000, 100_000, 1_000_000} {
		request := func(i int) *http.Request {
			return httptest.NewRequest("GET", "/wechat/checklogin?ticket=ticket"+strconv.Itoa(i*7919%tickets), nil)
		}
		handler := quietServer(b, tickets).routes()
		beside(b, fmt.Sprintf("tickets=%d", tickets), serveAll(floor, request), serveAll(handler.ServeHTTP, request))
	}
}

// BenchmarkPush is a signed SCAN that completes a ticket.
func BenchmarkPush(b *testing.B) {
	s := quietServer(b, 0)
	pushes := 0
	request := func(int) *http.Request {
		pushes++
		ticket := "push" + strconv.Itoa(pushes)
		must(b, s.tickets.begin(b.Context(), ticket, flowScan, "x", asker{}))
		body := strings.NewReader(pushXML("openid", "SCAN", "scene", ticket))
		return httptest.NewRequest("POST", "/wechat/message?"+s.config.signedQuery().Encode(), body)
	}
	beside(b, "SCAN", serveAll(floor, request), serveAll(s.routes().ServeHTTP, request))
}

// BenchmarkAuthQR is a new ticket of flow B and its picture, beside a picture
// of the same text at level Highest, as many draw it.
func BenchmarkAuthQR(b *testing.B) {
	s := quietServer(b, 0)
	handler := s.routes()
	beside(b, "getauthqr", func(b *testing.B) {
		link := s.wechat.authorizeURL(s.config.publicURL+"/wechat/accessusercode", digest("T").String())
		for b.Loop() {
			qrcode.Encode(link, qrcode.Highest, 256)
		}
	}, func(b *testing.B) {
		for b.Loop() {
			out := httptest.NewRecorder()
			handler.ServeHTTP(out, httptest.NewRequest("GET", "/wechat/getauthqr", nil))
			picture := "/wechat/qr.png?ticket=" + out.Body.String()[len(`{"ticket":"`):][:26]
			handler.ServeHTTP(nobody{make(http.Header, 8)}, httptest.NewRequest("GET", picture, nil))
		}
	})
}
